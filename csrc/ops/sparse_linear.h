// The block-sparse linear op and its gradients: one check, which every dispatch key calls, and what they compute with.
#pragma once

#include "include/blockdiag.h"

#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

namespace blockdiag {

/// The sizes of one layer, from its input and its kept blocks.
struct SparseLinearSizes {
  c10::SymInt batch; // product of the input's leading dimensions
  c10::SymInt block_rows, block_cols, out_block, in_block, num_blocks;
  c10::SmallVector<c10::SymInt, 5> output; // the shape of the output
};

/// Checks shapes, dtypes and devices. The values of the indices are checked by what computes with them.
SparseLinearSizes check_sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
);

SparseLinearSizes check_sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
);

SparseLinearSizes check_sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
);

/// Checks the indices of a CPU: offsets that ascend from 0 to the number of blocks, and columns that ascend in each row
/// of blocks, below `block_cols`.
void check_block_indices(
    const char* op, const at::Tensor& crow_indices, const at::Tensor& col_indices, int64_t block_cols
);

} // namespace blockdiag
