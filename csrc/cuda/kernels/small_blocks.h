// Our own kernels for small blocks, on tensor cores. Opt-in, as they have not run on a GPU yet.
#pragma once

#include "problem/gemm.h"

#include <atomic>

namespace blockdiag::cuda {

/// Whether these kernels take the problem: float16 or bfloat16, accumulated in float32, and
///
/// - activation times weight (B not transposed, A in any layout): m and k up to 64, with or without a bias;
/// - or a sum over the batch (A not transposed, B transposed): m and n up to 64, with or without the bias's gradient;
///
/// on compute capability 8.0 or newer. These may be float32 all the same:
///
/// - C, and the bias or its gradient: a bias is added, and results are stored, unrounded;
/// - A, and in the first case B beside it: rounded to the half type as they are read.
///
/// Equal calls give equal bits on the same kind of device.
bool small_blocks_take(const GemmProblem& problem);

/// Computes a problem that small_blocks_take accepts.
bool run_small_blocks(const GemmProblem& problem, const Operands& operands);

/// The number of rows from which a sum over the batch is split into parts that a second kernel adds up. Becomes a
/// constant once measured on a GPU.
std::atomic<int64_t>& small_blocks_split_rows();

} // namespace blockdiag::cuda
