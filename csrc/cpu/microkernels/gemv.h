// Products that use every element of the largest operand once or twice. They are memory bound, so that operand is read
// or written row by row.
#pragma once

#include "element.h"
#include "thresholds.h"

namespace blockdiag::cpu {
namespace {

/// A part of the result with few rows: out(i, j) = bias(j) + sum over p < depth of left(i, p) * right(p, j).
template <typename Half, typename Right, typename Out>
struct FewRows {
  Elements<Half> left; // (i, p) at i * left_row_stride + p * left_depth_stride
  int64_t left_row_stride;
  int64_t left_depth_stride;
  const Right* right; // rows are right_ld apart
  int64_t right_ld;
  Elements<Half> bias; // or none
  Out* out;            // (i, j) at i * out_ld + j
  int64_t out_ld;
  int64_t rows, cols, depth;
};

/// For a transposed right operand, (p, j) at p + j * right_ld: each sum runs along a vector. `left`, (i, p) at i * left_ld
/// + p, is part.left or the same in float32. kRows rows of it at a time, with as many rows of the right operand as there
/// are registers for. That operand is read once from memory, and not packed.
///
/// Not inlined: in its callers the sums do not stay in registers.
template <typename Packed, int kRows, bool kFromMemory, typename Half, typename Left, typename Right, typename Out>
[[gnu::noinline]] void dot_products(const FewRows<Half, Right, Out>& part, const Left* left, int64_t left_ld) {
  constexpr int kCols = Vector::kLanes / kRows;
  constexpr int kStep = Vector::kLanes * Packed::kDepth;
  // Too many rows are open at once for the hardware prefetcher: they are prefetched some steps ahead.
  const int64_t ahead =
      kCols * std::max<int64_t>(kPrefetchBytes / static_cast<int64_t>(sizeof(Right)) / (kCols * part.depth), 1) *
      part.right_ld;
  const int64_t passes = std::min<int64_t>((part.rows + kRows - 1) / kRows, kCols);
  for (int64_t j = 0; j < part.cols; j += kCols) {
    const auto cols = static_cast<int>(std::min<int64_t>(part.cols - j, kCols));
    const Right* right[kCols]; // the last one repeats
    for (int c = 0; c < kCols; ++c) {
      right[c] = part.right + (j + std::min(c, cols - 1)) * part.right_ld;
    }
    for (int64_t i = 0; i < part.rows; i += kRows) {
      const auto rows = static_cast<int>(std::min<int64_t>(part.rows - i, kRows));
      const Left* rows_of_left[kRows]; // the last one repeats
      for (int r = 0; r < kRows; ++r) {
        rows_of_left[r] = left + (i + std::min(r, rows - 1)) * left_ld;
      }
      Vector sums[kRows * kCols];
#pragma GCC unroll 16
      for (auto& sum : sums) {
        sum = Vector::zero();
      }
      // The first pass over these rows of the right operand prefetches, or from memory each pass its share.
      bool prefetches[kCols];
      for (int c = 0; c < kCols; ++c) {
        prefetches[c] = kFromMemory ? c % passes == i / kRows % kCols : i == 0;
      }
      const auto add = [&](int64_t p, int deep) __attribute__((always_inline)) {
        Vector factors[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          factors[r] = Packed::pack_along_depth(rows_of_left[r] + p, deep);
        }
#pragma GCC unroll 16
        for (int c = 0; c < kCols; ++c) {
          const auto row = Packed::pack_along_depth(right[c] + p, deep);
          if (kRows <= kFewRows || prefetches[c]) {
            const auto* const next = right[c] + ahead + p;
            __builtin_prefetch(next, 0, 2);
            if constexpr (kFromMemory) { // again, as the processor drops some when it waits for many
              __builtin_prefetch(next + kStep, 0, 2);
            }
          }
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            sums[r * kCols + c] = Packed::plus_product(sums[r * kCols + c], factors[r], row);
          }
        }
      };
      int64_t p = 0;
      for (; p + kStep <= part.depth; p += kStep) {
        add(p, kStep);
      }
      if (p < part.depth) {
        add(p, static_cast<int>(part.depth - p));
      }
      const Vector total = sum_each(sums);
      const auto store = [&](Vector sum, int r) {
        if (part.bias) {
          sum = sum + part.bias.load(j, cols);
        }
        store_partial(sum, part.out + (i + r) * part.out_ld + j, cols);
      };
      if constexpr (kRows == 1) {
        store(total, 0);
        continue;
      }
      float totals[Vector::kLanes];
      Vector::store(total, totals);
      for (int r = 0; r < rows; ++r) {
        if constexpr (kWideVectors) {
          store(load_partial(totals + r * kCols, cols), r);
          continue;
        }
        for (int c = 0; c < cols; ++c) { // few, and AVX2's masked stores are slow
          const float sum = totals[r * kCols + c];
          part.out[(i + r) * part.out_ld + j + c] = static_cast<Out>(part.bias ? sum + part.bias[j + c] : sum);
        }
      }
    }
  }
}

/// For a right operand that is not transposed, (p, j) at p * right_ld + j, and at most kLongRow columns. Parts of
/// kPanelDepth are summed one by one, and then added: a batch may be long.
template <typename Half, typename Right, typename Out>
void gemv(const FewRows<Half, Right, Out>& part) {
  constexpr int kStreams = 8; // rows of the right operand read at once
  float sums[kLongRow], totals[kLongRow];
  for (int64_t i = 0; i < part.rows; ++i) {
    const auto left = part.left + i * part.left_row_stride;
    Out* const out = part.out + i * part.out_ld;
    int64_t p0 = 0;
    while (p0 < part.depth) {
      const int64_t first = p0 / kPanelDepth * kPanelDepth, last = std::min(first + kPanelDepth, part.depth);
      const auto add = [&]<int kCount>(std::integral_constant<int, kCount> /*rows*/) {
        Vector factors[kCount];
#pragma GCC unroll 8
        for (int p = 0; p < kCount; ++p) {
          factors[p] = Vector::broadcast(left[(p0 + p) * part.left_depth_stride]);
        }
        const Right* const row = part.right + p0 * part.right_ld;
        for (int64_t j = 0; j < part.cols; j += Vector::kLanes) {
          const auto count = static_cast<int>(std::min<int64_t>(part.cols - j, Vector::kLanes));
          Vector sum = p0 > first             ? Vector::load(sums + j)
                       : p0 == 0 && part.bias ? part.bias.load(j, count)
                                              : Vector::zero();
#pragma GCC unroll 8
          for (int p = 0; p < kCount; ++p) {
            sum = sum.plus_product(factors[p], load_partial(row + p * part.right_ld + j, count));
          }
          if (p0 + kCount < last) {
            Vector::store(sum, sums + j);
            continue;
          }
          if (first > 0) {
            sum = Vector::load(totals + j) + sum;
          }
          if (last < part.depth) {
            Vector::store(sum, totals + j);
          } else {
            store_partial(sum, out + j, count);
          }
        }
        p0 += kCount;
      };
      const int64_t left_over = last - p0;
      left_over >= kStreams ? add(std::integral_constant<int, kStreams>())
      : left_over >= 4      ? add(std::integral_constant<int, 4>())
      : left_over >= 2      ? add(std::integral_constant<int, 2>())
                            : add(std::integral_constant<int, 1>());
    }
  }
}

} // namespace
} // namespace blockdiag::cpu
