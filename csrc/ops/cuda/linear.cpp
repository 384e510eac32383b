#include "ops/linear.h"
#include "cuda/backend.h"

#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace blockdiag::cuda {
namespace {

at::Tensor linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(input.device());
  return compute_linear(input, weight, bias, out_dtype, backend());
}

at::Tensor linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(grad_output.device());
  return compute_linear_input_grad(grad_output, weight, input_sizes, out_dtype, backend());
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(grad_output.device());
  return compute_linear_weight_grad(grad_output, input, weight_sizes, out_dtype, backend());
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(grad_output.device());
  return compute_linear_weight_bias_grad(grad_output, input, weight_sizes, out_dtype, backend());
}

} // namespace
} // namespace blockdiag::cuda

TORCH_LIBRARY_IMPL(blockdiag, CUDA, m) {
  m.impl("linear", TORCH_FN(blockdiag::cuda::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::cuda::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::cuda::linear_weight_grad));
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::cuda::linear_weight_bias_grad));
}
