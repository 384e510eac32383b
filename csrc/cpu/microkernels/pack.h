// Packs parts of the operands in the order in which the GEMM microkernel reads them.
#pragma once

#include "element.h"
#include "thresholds.h"

namespace blockdiag::cpu {
namespace {

/// Packs the depth x cols panel of the right operand, padded with zeros to whole vectors, in rows of kPanelCols.
/// Element (p, j) is at p * ld + j, or at p + j * ld if transposed. Prefetches the next panel, which spans too many
/// rows for the hardware prefetcher, and with `prefetch` the next rows.
template <typename Packed, typename T>
void pack_right(const T* data, int64_t ld, bool transposed, int64_t depth, int64_t cols, bool prefetch, float* panel) {
  constexpr int kDepth = Packed::kDepth;
  for (int64_t j = 0; j < cols; j += Vector::kLanes) {
    const auto count = static_cast<int>(std::min<int64_t>(cols - j, Vector::kLanes));
    if (!transposed) {
      float* to = panel + j;
      for (int64_t p = 0; p < depth; p += kDepth, to += kPanelCols) {
        const auto rows = static_cast<int>(std::min<int64_t>(depth - p, kDepth));
        Vector::store(Packed::pack_across_depth(data + p * ld + j, ld, rows, count), to);
        __builtin_prefetch(data + p * ld + j + kPanelCols);
        if (prefetch) {
          __builtin_prefetch(data + (p + kAheadDepth) * ld + j);
        }
      }
      continue;
    }
    float* to = panel + j;
    for (int64_t p = 0; p < depth; p += Vector::kLanes * kDepth) {
      const auto deep = static_cast<int>(std::min<int64_t>(depth - p, Vector::kLanes * kDepth));
      Vector rows[Vector::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vector::kLanes; ++i) {
        rows[i] = i < count ? Packed::pack_along_depth(data + (j + i) * ld + p, deep) : Vector::zero();
        __builtin_prefetch(data + (j + i + Vector::kLanes) * ld + p);
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < Vector::kLanes; ++i) {
        if (i * kDepth < deep) {
          Vector::store(rows[i], to);
          to += kPanelCols;
        }
      }
    }
  }
}

/// Packs the left operand without reordering: rows x depth, or depth x rows if transposed. Element (i, p) is at i * ld
/// + p, or at i + p * ld; the next depths are prefetched then, with `prefetch`. Returns the stride from row to row, or
/// from depth to depth, in packed elements.
template <typename Packed, typename T>
int64_t pack_left(
    const T* data, int64_t ld, bool transposed, int64_t rows, int64_t depth, bool prefetch, float* packed
) {
  constexpr int kDepth = Packed::kDepth;
  if (transposed) {
    for (int64_t p = 0; p < depth; p += kDepth, packed += rows) {
      const auto deep = static_cast<int>(std::min<int64_t>(depth - p, kDepth));
      for (int64_t i = 0; i < rows; i += Vector::kLanes) {
        const auto count = static_cast<int>(std::min<int64_t>(rows - i, Vector::kLanes));
        if (prefetch) {
          __builtin_prefetch(data + (p + kAheadDepth) * ld + i);
          __builtin_prefetch(data + p * ld + i + rows); // the next block's
        }
        store_partial(Packed::pack_across_depth(data + p * ld + i, ld, deep, count), packed + i, count);
      }
    }
    return rows;
  }
  const int64_t packed_ld = (depth + kDepth - 1) / kDepth;
  for (int64_t i = 0; i < rows; ++i, packed += packed_ld) {
    for (int64_t p = 0; p < packed_ld; p += Vector::kLanes) {
      const auto count = static_cast<int>(std::min<int64_t>(packed_ld - p, Vector::kLanes));
      const auto deep = static_cast<int>(std::min<int64_t>(depth - p * kDepth, Vector::kLanes * kDepth));
      store_partial(Packed::pack_along_depth(data + i * ld + p * kDepth, deep), packed + p, count);
    }
  }
  return packed_ld;
}

} // namespace
} // namespace blockdiag::cpu
