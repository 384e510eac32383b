// Small blocks on tensor cores, by kernels of our own. Not run on a GPU yet, and therefore used only if asked for.
#pragma once

#include "problem/gemm.h"

#include <atomic>

namespace blockdiag::cuda {

/// Whether these kernels compute such a problem, accumulated in float32: float16 and bfloat16,
///
/// - activation times weight (B not transposed, A in any layout): m and k up to 64, with or without a bias;
/// - a sum over the batch (A not transposed, B transposed): m and n up to 64, with or without the bias's gradient;
///
/// and compute capability 8.0 and newer. Equal calls give equal bits on the same kind of device.
bool small_blocks_take(const GemmProblem& problem);

/// Computes a problem that they take.
bool run_small_blocks(const GemmProblem& problem, const Operands& operands);

/// From how many rows on a sum over the batch is split into parts, which a second kernel adds up. To be measured on a GPU, and
/// then a constant.
std::atomic<int64_t>& small_blocks_split_rows();

} // namespace blockdiag::cuda
