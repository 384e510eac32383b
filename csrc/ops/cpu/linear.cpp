#include "ops/linear.h"
#include "cpu/backend.h"

#include <torch/library.h>

namespace blockdiag::cpu {
namespace {

at::Tensor linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  return compute_linear(input, weight, bias, out_dtype, backend());
}

at::Tensor linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  return compute_linear_input_grad(grad_output, weight, input_sizes, out_dtype, backend());
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  return compute_linear_weight_grad(grad_output, input, weight_sizes, out_dtype, backend());
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  return compute_linear_weight_bias_grad(grad_output, input, weight_sizes, out_dtype, backend());
}

/// Asks whoever computes large problems of the half type: some libraries compute one of the two, or no small ones.
bool converts(DType half) {
  constexpr int64_t kSize = 1 << 12;
  const Operand operand{.ld = kSize, .stride = kSize * kSize};
  const Gemm gemm{.m = kSize, .n = kSize, .k = kSize, .batch = 1, .a = operand, .b = operand, .c = operand};
  return backend().same_takes({gemm, half, {}}, {gemm, half, {}, {.a = true}});
}

const bool registered = register_mixing(at::kCPU, {.converts = converts});

} // namespace
} // namespace blockdiag::cpu

TORCH_LIBRARY_IMPL(blockdiag, CPU, m) {
  m.impl("linear", TORCH_FN(blockdiag::cpu::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::cpu::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::cpu::linear_weight_grad));
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::cpu::linear_weight_bias_grad));
}
