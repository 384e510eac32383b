#include "../pass.h"
#include "gemm.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cstring>

namespace blockdiag {
namespace {

void fill_rows(const at::Tensor& result, const at::Tensor& bias) {
  const size_t row_bytes = bias.nbytes();
  auto* const rows = static_cast<char*>(result.mutable_data_ptr());
  const void* const row = bias.const_data_ptr();
  constexpr int64_t kGrainBytes = 1 << 16; // of a copy worth a thread's while
  const int64_t grain = kGrainBytes / static_cast<int64_t>(row_bytes) + 1;
  at::parallel_for(0, result.numel() / bias.numel(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(rows + static_cast<size_t>(i) * row_bytes, row, row_bytes);
    }
  });
}

at::Tensor run(const Pass& pass) {
  return blockdiag::run(pass, {fill_rows, cpu::run_gemm});
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

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, CPU, m) {
  m.impl("linear", TORCH_FN(blockdiag::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::linear_weight_grad));
}
