// Shapes only, for torch.compile, torch.export and fake tensors.
#include "ops/linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace blockdiag::meta {
namespace {

at::TensorOptions options_of(const at::Tensor& argument, std::optional<at::ScalarType> out_dtype) {
  return argument.options().dtype(out_dtype.value_or(argument.scalar_type()));
}

at::Tensor linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  return at::empty_symint(check_linear(input, weight, bias, out_dtype).output, options_of(input, out_dtype));
}

at::Tensor linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  check_linear_input_grad(grad_output, weight, input_sizes, out_dtype);
  return at::empty_symint(input_sizes, options_of(grad_output, out_dtype));
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  check_linear_weight_grad(grad_output, input, weight_sizes, out_dtype);
  return at::empty_symint(weight_sizes, options_of(grad_output, out_dtype));
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  auto weight_grad = linear_weight_grad(grad_output, input, weight_sizes, out_dtype);
  return {std::move(weight_grad), at::empty_symint(weight_sizes.slice(0, 2), options_of(grad_output, out_dtype))};
}

} // namespace
} // namespace blockdiag::meta

TORCH_LIBRARY_IMPL(blockdiag, Meta, m) {
  m.impl("linear", TORCH_FN(blockdiag::meta::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::meta::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::meta::linear_weight_grad));
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::meta::linear_weight_bias_grad));
}
