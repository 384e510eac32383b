#include "../pass.h"
#include "gemm.h"

#include <torch/library.h>

namespace blockdiag {
namespace {

void run_gemm(const Pass& pass, const at::Tensor& result) {
  cpu::run_gemm(
      pass.gemm,
      result.scalar_type(),
      pass.a.const_data_ptr(),
      pass.b.const_data_ptr(),
      result.mutable_data_ptr(),
      pass.bias.defined() ? pass.bias.const_data_ptr() : nullptr
  );
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return run(linear_pass(input, weight, bias), run_gemm);
}

at::Tensor linear_input_grad(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes) {
  return run(linear_input_grad_pass(grad_output, weight, input_sizes), run_gemm);
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  return run(linear_weight_grad_pass(grad_output, input, weight_sizes), run_gemm);
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, CPU, m) {
  m.impl("linear", TORCH_FN(blockdiag::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::linear_weight_grad));
}
