// The gradient of a block-sparse matrix's values: dot products over the batch, of the kept blocks alone.
#pragma once

#include "sparse_panel.h"

namespace blockdiag::cpu {
namespace {

/// sums(n, c) = sum over p < length of left[n][p] * right[c][p]. As many as a vector has lanes.
template <int kLeft, int kRight>
void dot_tile(const float* left, int64_t left_ld, const float* const* right, int64_t length, float* result) {
  static_assert(kLeft * kRight == Vector::kLanes);
  Vector sums[kLeft * kRight];
#pragma GCC unroll 16
  for (auto& sum : sums) {
    sum = Vector::zero();
  }
  for (int64_t p = 0; p < length; p += Vector::kLanes) {
    Vector rows[kLeft];
#pragma GCC unroll 16
    for (int n = 0; n < kLeft; ++n) {
      rows[n] = Vector::load(left + n * left_ld + p);
    }
#pragma GCC unroll 16
    for (int c = 0; c < kRight; ++c) {
      const auto factor = Vector::load(right[c] + p);
#pragma GCC unroll 16
      for (int n = 0; n < kLeft; ++n) {
        sums[n * kRight + c] = sums[n * kRight + c].plus_product(rows[n], factor);
      }
    }
  }
  Vector::store(sum_each(sums), result);
}

/// One row of blocks: their columns of `input`, transposed as `grads` is, with rows of `length` padded to vectors.
struct ValuesRow {
  const float* grads; // out_block rows
  const float* inputs;
  const int32_t* cols;
  int64_t count, out_block, in_block, length, ld;
};

/// Writes, or adds, the gradients of kLeft output features from `n` on.
template <int kLeft>
void values_of_features(const ValuesRow& row, int64_t n, bool add, float* result) {
  constexpr int kRight = Vector::kLanes / kLeft;
  const int64_t columns = row.count * row.in_block;
  int64_t block = 0, k = 0;
  for (int64_t first = 0; first < columns; first += kRight) {
    const auto count = static_cast<int>(std::min<int64_t>(columns - first, kRight));
    const float* inputs[kRight];
    float* to[kRight];
    for (int c = 0; c < kRight; ++c) {
      inputs[c] = row.inputs + (row.cols[block] * row.in_block + k) * row.ld;
      to[c] = result + (block * row.out_block + n) * row.in_block + k;
      if (c + 1 < count && ++k == row.in_block) { // the last column repeats
        k = 0;
        ++block;
      }
    }
    if (++k == row.in_block) {
      k = 0;
      ++block;
    }
    float sums[Vector::kLanes];
    dot_tile<kLeft, kRight>(row.grads + n * row.ld, row.ld, inputs, row.length, sums);
    for (int c = 0; c < count; ++c) {
      for (int i = 0; i < kLeft; ++i) {
        float& value = to[c][i * row.in_block];
        value = add ? value + sums[i * kRight + c] : sums[i * kRight + c];
      }
    }
  }
}

/// All gradients of one row of blocks.
inline void values_of_row(const ValuesRow& row, bool add, float* result) {
  constexpr int kLeft = kWideVectors ? 4 : 2;
  int64_t n = 0;
  for (; n + kLeft <= row.out_block; n += kLeft) {
    values_of_features<kLeft>(row, n, add, result);
  }
  for (; n < row.out_block; ++n) {
    values_of_features<1>(row, n, add, result);
  }
}

} // namespace
} // namespace blockdiag::cpu
