// The schemas of the ops, and the C++ functions that call them through the dispatcher.
#include "include/blockdiag.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace blockdiag {
namespace {

template <typename Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

} // namespace

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  static const auto op = find_op<decltype(linear)>("blockdiag::linear");
  return op.call(input, weight, bias);
}

at::Tensor linear_input_grad(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes) {
  static const auto op = find_op<decltype(linear_input_grad)>("blockdiag::linear_input_grad");
  return op.call(grad_output, weight, input_sizes);
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  static const auto op = find_op<decltype(linear_weight_grad)>("blockdiag::linear_weight_grad");
  return op.call(grad_output, input, weight_sizes);
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  static const auto op = find_op<decltype(linear_weight_bias_grad)>("blockdiag::linear_weight_bias_grad");
  return op.call(grad_output, input, weight_sizes);
}

} // namespace blockdiag

TORCH_LIBRARY(blockdiag, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor", tags);
  m.def("linear_input_grad(Tensor grad_output, Tensor weight, SymInt[] input_sizes) -> Tensor", tags);
  m.def("linear_weight_grad(Tensor grad_output, Tensor input, SymInt[] weight_sizes) -> Tensor", tags);
  m.def("linear_weight_bias_grad(Tensor grad_output, Tensor input, SymInt[] weight_sizes) -> (Tensor, Tensor)", tags);
}
