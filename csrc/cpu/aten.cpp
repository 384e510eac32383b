// ATen's products: the fallback for every dtype.
#include "backend.h"

#include "scalar_type.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>

namespace blockdiag::cpu {
namespace {

/// op(matrix) as a row-major (batch, rows, cols) view.
at::Tensor row_major(const void* data, const GemmProblem& problem, const Operand& op, int64_t rows, int64_t cols) {
  return at::from_blob(
      const_cast<void*>(data), {problem.gemm.batch, rows, cols},
      {op.stride, op.transpose ? 1 : op.ld, op.transpose ? op.ld : 1}, at::TensorOptions(scalar_type_of(problem.dtype))
  );
}

at::Tensor result_of(const GemmProblem& problem, void* c) {
  return row_major(c, problem, problem.gemm.c, problem.gemm.n, problem.gemm.m);
}

} // namespace

GemmProblem with_bias_written(const GemmProblem& problem, const Operands& operands) {
  if (!problem.epilogue.bias) {
    return problem;
  }
  const auto bias = at::from_blob(
      const_cast<void*>(operands.bias), {problem.gemm.batch, 1, problem.gemm.m},
      at::TensorOptions(scalar_type_of(problem.dtype))
  );
  result_of(problem, operands.c).copy_(bias);
  return {problem.gemm, problem.dtype, {.accumulate = true}};
}

bool aten_takes(const GemmProblem& problem) { return !problem.epilogue.bias_grad && !problem.float32.any(); }

bool aten_run(const GemmProblem& given, const Operands& operands) {
  const auto problem = with_bias_written(given, operands);
  const auto& gemm = problem.gemm;
  const auto left = row_major(operands.b, problem, gemm.b, gemm.n, gemm.k);
  const auto right = row_major(operands.a, problem, gemm.a, gemm.k, gemm.m);
  const auto out = result_of(problem, operands.c);
  // bmm may copy strided operands and results. To bound the copies it gets a few blocks at a time, and large blocks go
  // to mm, which copies nothing.
  constexpr int64_t kCopyBytes = 1 << 18;
  const int64_t largest = std::max({gemm.n * gemm.m, gemm.n * gemm.k, gemm.k * gemm.m});
  const int64_t step = std::max<int64_t>(kCopyBytes / (largest * size_of(problem.dtype)), 1);
  for (int64_t start = 0; start < gemm.batch; start += step) {
    const int64_t count = std::min(step, gemm.batch - start);
    auto target = count == 1 ? out[start] : out.narrow(0, start, count);
    if (count == 1) {
      problem.epilogue.accumulate ? target.addmm_(left[start], right[start])
                                  : at::mm_out(target, left[start], right[start]);
    } else if (problem.epilogue.accumulate) {
      target.baddbmm_(left.narrow(0, start, count), right.narrow(0, start, count));
    } else {
      at::bmm_out(target, left.narrow(0, start, count), right.narrow(0, start, count));
    }
  }
  return true;
}

} // namespace blockdiag::cpu
