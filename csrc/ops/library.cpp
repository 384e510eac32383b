// Registers the ops, and defines the C++ functions that call them through the dispatcher.
#include "include/blockdiag.h"
#include "schemas.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace blockdiag {
namespace {

template <typename Function>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}

} // namespace

at::Tensor linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  static const auto op = find_op<decltype(linear)>("blockdiag::linear");
  return op.call(input, weight, bias, out_dtype);
}

at::Tensor linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  static const auto op = find_op<decltype(linear_input_grad)>("blockdiag::linear_input_grad");
  return op.call(grad_output, weight, input_sizes, out_dtype);
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  static const auto op = find_op<decltype(linear_weight_grad)>("blockdiag::linear_weight_grad");
  return op.call(grad_output, input, weight_sizes, out_dtype);
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  static const auto op = find_op<decltype(linear_weight_bias_grad)>("blockdiag::linear_weight_bias_grad");
  return op.call(grad_output, input, weight_sizes, out_dtype);
}

at::Tensor sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  static const auto op = find_op<decltype(sparse_linear)>("blockdiag::sparse_linear");
  return op.call(input, values, crow_indices, col_indices, bias, diagonal);
}

at::Tensor sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
) {
  static const auto op = find_op<decltype(sparse_linear_input_grad)>("blockdiag::sparse_linear_input_grad");
  return op.call(grad_output, values, crow_indices, col_indices, input_sizes);
}

at::Tensor sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
) {
  static const auto op = find_op<decltype(sparse_linear_values_grad)>("blockdiag::sparse_linear_values_grad");
  return op.call(grad_output, input, crow_indices, col_indices, values_sizes);
}

} // namespace blockdiag

TORCH_LIBRARY(blockdiag, m) {
  for (const char* schema : blockdiag::kSchemas) {
    m.def(schema, {at::Tag::pt2_compliant_tag});
  }
}
