// Products with a block-sparse matrix for a few rows of activations: the weights are read as they lie, once from memory.
#pragma once

#include "sparse_panel.h"

namespace blockdiag::cpu {
namespace {

/// Vectors of one block that are summed at once.
constexpr int kBlockVectors = 8;

/// Adds the vectors up in groups of kGroup neighboring lanes: kGroup vectors become one. Sum (vector i, group g) is in
/// lane g * kGroup + i % kGroup of rows[i / kGroup * kGroup].
template <int kGroup, int kCount, int kWidth = 1>
[[gnu::always_inline]] inline void sum_groups(Vector* rows) {
  if constexpr (kWidth < kGroup) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; i += 2 * kWidth) {
      exchange<kWidth>(rows[i], rows[i + kWidth], std::make_integer_sequence<int, Vector::kLanes>());
      rows[i] = rows[i] + rows[i + kWidth];
    }
    sum_groups<kGroup, kCount, 2 * kWidth>(rows);
  }
}

/// Sums over a row of blocks for one row of activations `x`, of the output features in kVectors vectors of each block.
/// A vector has kWidth inputs of kLanes / kWidth outputs, or of one output if in_block is a multiple of kWidth. Writes whole
/// vectors of outputs. kPartial: there is one vector, and it has only `lanes` values.
template <int kWidth, int kVectors, bool kPartial, typename T>
[[gnu::noinline]] void row_sums(
    const T* values, const int32_t* cols, int64_t count, int64_t in_block, int64_t block_size, int lanes,
    const float* x, float* result
) {
  constexpr int kOutputs = Vector::kLanes / kWidth;       // of a vector
  in_block = kWidth < Vector::kLanes ? kWidth : in_block; // a constant
  constexpr int kChains = std::max(1, kBlockVectors / 2 / kVectors);
  // Padded with zeros to whole groups.
  constexpr int kCount = (kVectors + kWidth - 1) / kWidth * kWidth;
  Vector sums[kChains][kCount];
  for (auto& chain : sums) {
    for (auto& sum : chain) {
      sum = Vector::zero();
    }
  }
  const auto add = [&](auto& chain, int64_t j) __attribute__((always_inline)) {
    const float* const inputs = x + cols[j] * in_block;
    for (int64_t k = 0; k < in_block; k += kWidth) {
      const auto factor = Vector::template repeat<kWidth>(inputs + k);
#pragma GCC unroll 16
      for (int i = 0; i < kVectors; ++i) {
        const T* const from = values + i * kOutputs * in_block + k;
        chain[i] = chain[i].plus_product(kPartial ? Vector::load_masked(from, lanes) : Vector::load(from), factor);
      }
    }
    values += block_size;
  };
  int64_t j = 0;
  for (; j + kChains <= count; j += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      add(sums[c], j + c);
    }
  }
  if constexpr (kChains > 1) {
    for (; j < count; ++j) {
      add(sums[0], j);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
#pragma GCC unroll 4
      for (int c = 1; c < kChains; ++c) {
        sums[0][i] = sums[0][i] + sums[c][i];
      }
    }
  }
  sum_groups<kWidth, kCount>(sums[0]);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; i += kWidth) {
    float lanes[Vector::kLanes];
    Vector::store(sums[0][i], lanes);
    for (int vector = i; vector < std::min(i + kWidth, kVectors); ++vector) {
      for (int group = 0; group < kOutputs; ++group) {
        result[vector * kOutputs + group] = lanes[group * kWidth + vector - i];
      }
    }
  }
}

/// How many inputs are beside each other in the vectors of a block: all of them, or a vector's. 0 if neither is possible.
inline int row_width(const BlockSparseMatrix& matrix) {
  for (const int width : {16, 8, 4, 1}) {
    const bool fits = width == Vector::kLanes ? matrix.in_block % width == 0 : matrix.in_block == width;
    if (width <= Vector::kLanes && fits) {
      return width;
    }
  }
  return 0;
}

/// Up to how many rows are few: fewer if vectors are not full.
inline int64_t few_rows_of(const BlockSparseMatrix& matrix, int width) {
  const int64_t outputs = Vector::kLanes / width; // of a vector
  const int64_t padded = (matrix.out_block + outputs - 1) / outputs * outputs;
  return std::max<int64_t>(kSparseFewRows * matrix.out_block / padded, 1);
}

/// All output features of one row of blocks. Writes whole vectors of them.
template <int kWidth, typename T>
void block_row_sums(
    const T* values, const int32_t* cols, int64_t count, const BlockSparseMatrix& matrix, const float* x, float* result
) {
  constexpr int kOutputs = Vector::kLanes / kWidth;
  int64_t left = matrix.out_block / kOutputs; // vectors
  const auto take = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
    for (; left >= kVectors; left -= kVectors) {
      row_sums<kWidth, kVectors, false>(values, cols, count, matrix.in_block, matrix.block_size(), 0, x, result);
      values += kVectors * kOutputs * matrix.in_block;
      result += kVectors * kOutputs;
    }
  };
  take(std::integral_constant<int, kBlockVectors>());
  take(std::integral_constant<int, kBlockVectors / 2>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
  if (const auto rest = static_cast<int>(matrix.out_block % kOutputs); rest > 0) {
    row_sums<kWidth, 1, true>(values, cols, count, matrix.in_block, matrix.block_size(), rest * kWidth, x, result);
  }
}

} // namespace
} // namespace blockdiag::cpu
