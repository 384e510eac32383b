// A product with a block-sparse matrix and its gradients, independent of devices and torch.
#pragma once

#include "dtype.h"

#include <cstdint>
#include <limits>

namespace blockdiag {

/// A matrix of block_rows x block_cols blocks, of which num_blocks are kept; a block is out_block x in_block. The weight
/// of a layer: its rows are output features.
struct BlockSparseMatrix {
  int64_t block_rows, block_cols, out_block, in_block, num_blocks;

  int64_t out_features() const { return block_rows * out_block; }
  int64_t in_features() const { return block_cols * in_block; }
  int64_t block_size() const { return out_block * in_block; }
};

/// Kernels address blocks, columns of blocks and their elements by 32-bit indices.
constexpr int64_t kSparseMax = std::numeric_limits<int32_t>::max();

/// y(f) = (x W^T)(f) + bias(f) + diagonal(f) x(f mod in_features), dx = dy W, or the kept blocks of dy^T x.
enum class SparsePass : uint8_t { kOutput, kInputGrad, kValuesGrad };

/// No size is 0, but for num_blocks.
struct SparseProblem {
  SparsePass pass;
  DType dtype;
  int64_t batch;
  BlockSparseMatrix matrix;
};

/// The operands of a pass; those of other passes, and what is left out, are null. Rows of activations are contiguous,
/// `ld` apart.
struct SparseOperands {
  const int32_t* row_offsets = nullptr; // block_rows + 1: where the blocks of a row of blocks begin
  const int32_t* cols = nullptr;        // of each block, ascending in each row
  const void* values = nullptr;         // num_blocks x out_block x in_block
  const void* input = nullptr;          // batch x in_features
  int64_t input_ld = 0;
  const void* grad_output = nullptr; // batch x out_features
  int64_t grad_output_ld = 0;
  const void* bias = nullptr;     // out_features
  const void* diagonal = nullptr; // out_features, a multiple of in_features
  void* result = nullptr;         // contiguous: as grad_output, input or values
};

} // namespace blockdiag
