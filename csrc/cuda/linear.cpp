#include "../bias_grad.h"
#include "../check.h"
#include "../pass.h"
#include "gemm.h"
#include "small_blocks.h"

#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

namespace blockdiag {
namespace {

void run_gemm(const Pass& pass, const at::Tensor& result) {
  const bool has_bias = pass.bias.defined();
  if (const auto library = cuda::preferred_library(); library != cuda::Library::kCublas) {
    const auto dtype = result.scalar_type();
    const void* bias = has_bias ? pass.bias.const_data_ptr() : nullptr;
    const void *a = pass.a.const_data_ptr(), *b = pass.b.const_data_ptr();
    void* c = result.mutable_data_ptr();
    if ((library == cuda::Library::kSmallBlocks &&
         cuda::run_small_blocks(pass.gemm, dtype, a, b, bias, c, /*bias_grad=*/nullptr)) ||
        cuda::run_lt_gemm(pass.gemm, dtype, a, b, bias, c)) {
      return;
    }
  }
  if (has_bias) {
    // The GEMM adds to it: no second pass over the result, and no rounding between product and bias.
    const bool as_rows = result.size(-1) == pass.bias.numel();
    result.copy_(as_rows ? pass.bias.view(-1) : pass.bias.view({pass.gemm.batch, pass.gemm.m}));
  }
  cuda::run_gemm(
      pass.gemm,
      result.scalar_type(),
      pass.a.const_data_ptr(),
      pass.b.const_data_ptr(),
      result.mutable_data_ptr(),
      /*accumulate=*/has_bias
  );
}

at::Tensor run(const Pass& pass) {
  const c10::cuda::CUDAGuard guard(pass.a.device());
  return blockdiag::run(pass, run_gemm);
}

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return run(linear_pass(input, weight, bias));
}

at::Tensor linear_input_grad(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes) {
  return run(linear_input_grad_pass(grad_output, weight, input_sizes));
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  return run(linear_weight_grad_pass(grad_output, input, weight_sizes));
}

std::tuple<at::Tensor, at::Tensor> weight_and_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  const c10::cuda::CUDAGuard guard(grad_output.device());
  const auto pass = linear_weight_grad_pass(grad_output, input, weight_sizes);
  const Gemm& gemm = pass.gemm;
  const auto dtype = grad_output.scalar_type();
  if (cuda::may_fuse_bias_grad(dtype) && gemm.m != 0 && gemm.n != 0 && gemm.k != 0 && gemm.batch != 0) {
    auto weight_grad = at::empty(pass.result_sizes, pass.a.options());
    auto bias_grad = at::empty({gemm.batch, gemm.n}, pass.a.options());
    const void *a = pass.a.const_data_ptr(), *b = pass.b.const_data_ptr();
    void *c = weight_grad.mutable_data_ptr(), *sum = bias_grad.mutable_data_ptr();
    if ((cuda::preferred_library() == cuda::Library::kSmallBlocks &&
         cuda::run_small_blocks(gemm, dtype, a, b, /*bias=*/nullptr, c, sum)) ||
        cuda::run_lt_weight_bias_grad(gemm, dtype, a, b, c, sum)) {
      return {std::move(weight_grad), std::move(bias_grad)};
    }
  }
  auto weight_grad = blockdiag::run(pass, run_gemm);
  const bool stacked = is_stacked(input.sym_sizes(), weight_sizes);
  return {std::move(weight_grad), bias_grad(grad_output, stacked, /*bias_stacked=*/true, weight_sizes)};
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, CUDA, m) {
  m.impl("linear", TORCH_FN(blockdiag::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::linear_weight_grad));
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::weight_and_bias_grad));
}
