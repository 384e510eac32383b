#include "ops/linear.h"
#include "cuda/backend.h"

#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace blockdiag::cuda {
namespace {

at::Tensor compute_on_device(const Product& product) {
  const c10::cuda::CUDAGuard guard(product.a.device());
  return compute(product, backend());
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return compute_on_device(lower_linear(input, weight, bias));
}

at::Tensor linear_input_grad(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes) {
  return compute_on_device(lower_linear_input_grad(grad_output, weight, input_sizes));
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  return compute_on_device(lower_linear_weight_grad(grad_output, input, weight_sizes));
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  const c10::cuda::CUDAGuard guard(grad_output.device());
  return compute_weight_bias_grad(grad_output, input, weight_sizes, backend());
}

} // namespace
} // namespace blockdiag::cuda

TORCH_LIBRARY_IMPL(blockdiag, CUDA, m) {
  m.impl("linear", TORCH_FN(blockdiag::cuda::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::cuda::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::cuda::linear_weight_grad));
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::cuda::linear_weight_bias_grad));
}
