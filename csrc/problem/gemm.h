// A strided batched GEMM with its epilogue, in BLAS's column-major terms: the lowering of every pass of the linear op.
//
// Independent of devices and torch: both backends run what is described here, so CPU tests cover what a GPU runs.
#pragma once

#include "dtype.h"
#include "epilogue.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

namespace blockdiag {

/// The largest size and leading dimension that BLAS's 32-bit integers hold.
constexpr int64_t kBlasMax = std::numeric_limits<int32_t>::max();

/// One matrix per block, as stored: element (i, j) of block g is at g * block_stride + i * row_stride + j * col_stride.
struct Blocks {
  int64_t rows, cols;
  int64_t row_stride, col_stride, block_stride;

  Blocks transposed() const { return {cols, rows, col_stride, row_stride, block_stride}; }
};

/// One matrix per block, in BLAS's terms: op, leading dimension, and the stride from block to block.
struct Operand {
  bool transpose = false;
  int64_t ld = 0;
  int64_t stride = 0;
};

/// C[g] = op(A[g]) op(B[g]) for g < batch: op(A) is m x k, op(B) is k x n, C is m x n, all column-major.
struct Gemm {
  int64_t m, n, k, batch;
  Operand a, b, c;
};

/// The matrices of a problem of a half type that are float32 all the same: a backend converts them as it reads and
/// writes them.
struct Float32 {
  bool a = false, b = false, c = false, bias = false; // the bias's gradient is as c

  bool any() const { return a || b || c || bias; }
};

/// A GEMM with its epilogue, computed in one dtype. No size is 0.
struct GemmProblem {
  Gemm gemm;
  DType dtype;
  Epilogue epilogue;
  Float32 float32 = {};
};

/// The addresses of a problem's matrices. C aliases neither A nor B. What the epilogue does not use is null.
struct Operands {
  const void* a;
  const void* b;
  void* c;
  const void* bias;
  void* bias_grad;
};

/// The transpose of `blocks` as a column-major operand, or nothing if BLAS cannot address it.
///
/// A row-major matrix read column by column is its own transpose, so unit column stride needs no op and unit row stride
/// needs one. The leading dimension must reach past the unit-stride dimension; the stride of a dimension of one element
/// is arbitrary.
inline std::optional<Operand> transposed_operand(const Blocks& blocks) {
  const auto reaches = [](int64_t stride, int64_t extent) { return stride >= extent && stride <= kBlasMax; };
  const int64_t cols = std::max<int64_t>(blocks.cols, 1);
  const int64_t rows = std::max<int64_t>(blocks.rows, 1);
  if (cols == 1 || blocks.col_stride == 1) {
    if (rows == 1) {
      return Operand{false, cols, blocks.block_stride};
    }
    if (reaches(blocks.row_stride, cols)) {
      return Operand{false, blocks.row_stride, blocks.block_stride};
    }
  }
  if (rows == 1 || blocks.row_stride == 1) {
    if (cols == 1) {
      return Operand{true, rows, blocks.block_stride};
    }
    if (reaches(blocks.col_stride, rows)) {
      return Operand{true, blocks.col_stride, blocks.block_stride};
    }
  }
  return std::nullopt;
}

/// out[g] = left[g] right[g] for every block g, as BLAS computes it: out^T = right^T left^T.
///
/// `left` and `right` must be addressable (see transposed_operand), and `out` row-major. An empty product or sum never
/// reaches BLAS: its operands stay unset, as its strides are arbitrary.
inline Gemm describe_product(const Blocks& left, const Blocks& right, const Blocks& out, int64_t num_blocks) {
  Gemm gemm{.m = right.cols, .n = left.rows, .k = left.cols, .batch = num_blocks, .a = {}, .b = {}, .c = {}};
  if (gemm.m != 0 && gemm.n != 0 && gemm.k != 0 && gemm.batch != 0) {
    gemm.a = transposed_operand(right).value();
    gemm.b = transposed_operand(left).value();
    gemm.c = transposed_operand(out).value();
  }
  return gemm;
}

} // namespace blockdiag
