// Small blocks on tensor cores, by kernels of our own. Not run on a GPU yet.
#pragma once

#include "../gemm.h"

#include <c10/core/ScalarType.h>

#include <atomic>

namespace blockdiag::cuda {

/// Runs `gemm` on float16 or bfloat16 matrices on the current device and stream, accumulated in float32. C must not overlap
/// A or B, and no size may be 0. Does nothing and returns false where it does not apply:
///
/// - activation times weight (B not transposed, A in any layout): m and k up to 64;
/// - a sum over the batch (A not transposed, B transposed): m and n up to 64, no `bias`;
/// - `bias_grad` with the second alone; and compute capability 8.0 and newer.
///
/// `bias`, if it is not null, is added: contiguous, gemm.m elements for each block. `bias_grad`, if it is not null, gets the
/// sum of every row of op(B): gemm.n elements for each block. Equal calls give equal bits on the same kind of device.
bool run_small_blocks(
    const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c, void* bias_grad
);

/// From how many rows on a sum over the batch is split into parts, which a second kernel adds up. To be measured on a GPU, and
/// then a constant.
std::atomic<int64_t>& small_blocks_split_rows();

} // namespace blockdiag::cuda
