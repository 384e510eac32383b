// Products of matrices of more than a few rows, a panel of two vectors of columns at a time.
//
// The innermost loop is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): the sums
// stay in registers, a panel of the right operand stays in the L1 cache, and the left operand streams past. A library copies
// both operands into the order in which this loop reads them, which pays for large matrices. Blocks of a block-diagonal layer
// are small: here the left operand is read where it lies if it can be, and the right one if it is read few times.
//
// For files that have chosen an instruction set; see headers.h.
#pragma once

#include "products.h"

namespace blockdiag::cpu {
namespace {

constexpr int kPanelCols = 2 * Vector::kLanes;
constexpr int64_t kPanelDepth = 256; // in packed elements: a panel stays in the L1 cache

/// A few rows of one panel of the result: out(i, j) = added(i, j) + sum over p < depth of left(i, p) * right(p, j), where
/// left and right hold packed elements.
template <typename Out>
struct Strip {
  const char* left;          // (i, p) at i * left_row_stride + p * left_depth_stride, in bytes
  int64_t left_row_stride;   // sizeof(float) if transposed
  int64_t left_depth_stride; // sizeof(float) if not
  const float* right;        // (p, j) at p * right_ld + j
  int64_t right_ld;
  int64_t depth;
  const float* added; // (i, j) at i * added_ld + j; nothing if null
  int64_t added_ld;
  Out* out; // (i, j) at i * out_ld + j
  int64_t out_ld;
  int last_cols; // in the last vector of each row
};

inline Vector broadcast_packed(const char* data) {
  float packed;
  std::memcpy(&packed, data, sizeof(packed)); // pairs of half types need not be aligned as floats are
  return Vector::broadcast(packed);
}

template <typename T, typename Out, int kRows, int kVectors, bool kLeftTransposed>
void compute_strip(const Strip<Out>& strip) {
  Vector sums[kRows][kVectors];
  const auto lanes = [&](int v) { return v + 1 < kVectors ? Vector::kLanes : strip.last_cols; };
#pragma GCC unroll 16
  for (auto& row : sums) {
#pragma GCC unroll 2
    for (auto& sum : row) {
      sum = Vector::zero();
    }
  }
  const char* left = strip.left;
  const float* right = strip.right;
  const int64_t row_stride = kLeftTransposed ? sizeof(float) : strip.left_row_stride;
  const int64_t depth_stride = kLeftTransposed ? strip.left_depth_stride : sizeof(float);
  for (int64_t p = 0; p < strip.depth; ++p) {
    Vector row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      row[v] = Vector::load(right + v * Vector::kLanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const auto factor = broadcast_packed(left + i * row_stride);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        sums[i][v] = Products<T>::plus_product(sums[i][v], factor, row[v]);
      }
    }
    left += depth_stride;
    right += strip.right_ld;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      // Not where the sum starts: over a long depth, sums of sums lose less than one long chain.
      if (strip.added != nullptr) {
        sums[i][v] = sums[i][v] + load_partial(strip.added + i * strip.added_ld + v * Vector::kLanes, lanes(v));
      }
      store_partial(sums[i][v], strip.out + i * strip.out_ld + v * Vector::kLanes, lanes(v));
    }
  }
}

/// compute_strip for each number of rows, from 1.
template <typename T, typename Out, int kVectors, bool kLeftTransposed, int... kRow>
constexpr auto strip_functions(std::integer_sequence<int, kRow...> /*rows*/) {
  return std::array{&compute_strip<T, Out, kRow + 1, kVectors, kLeftTransposed>...};
}

/// Computes `rows` rows of a panel, shared out evenly among as few strips as there can be.
template <typename T, typename Out, int kVectors, bool kLeftTransposed>
void compute_strips(Strip<Out> strip, int64_t rows) {
  static constexpr auto kFunctions =
      strip_functions<T, Out, kVectors, kLeftTransposed>(std::make_integer_sequence<int, Vector::kMaxRows>());
  for (int64_t strips = (rows + Vector::kMaxRows - 1) / Vector::kMaxRows; strips > 0; --strips) {
    const int64_t count = (rows + strips - 1) / strips;
    kFunctions[static_cast<size_t>(count - 1)](strip);
    strip.left += count * strip.left_row_stride;
    strip.added += strip.added == nullptr ? 0 : count * strip.added_ld;
    strip.out += count * strip.out_ld;
    rows -= count;
  }
}

template <typename T, typename Out>
void compute_panel(const Strip<Out>& strip, int64_t rows, int64_t cols, bool left_transposed) {
  if (cols <= Vector::kLanes) {
    left_transposed ? compute_strips<T, Out, 1, true>(strip, rows) : compute_strips<T, Out, 1, false>(strip, rows);
  } else {
    left_transposed ? compute_strips<T, Out, 2, true>(strip, rows) : compute_strips<T, Out, 2, false>(strip, rows);
  }
}

/// Packs the depth x cols panel of the right operand, padded with zeros to whole vectors, in rows of kPanelCols. Element
/// (p, j) of it stands at p * ld + j, or at p + j * ld if it is transposed. Asks for the next panel, which lies across so many
/// rows that the CPU does not foresee it.
template <typename T>
void pack_panel(const T* data, int64_t ld, bool transposed, int64_t depth, int64_t cols, float* panel) {
  constexpr int kDepth = Products<T>::kDepth;
  for (int64_t j = 0; j < cols; j += Vector::kLanes) {
    const auto count = static_cast<int>(std::min<int64_t>(cols - j, Vector::kLanes));
    if (!transposed) {
      float* to = panel + j;
      for (int64_t p = 0; p < depth; p += kDepth, to += kPanelCols) {
        const auto rows = static_cast<int>(std::min<int64_t>(depth - p, kDepth));
        Vector::store(Products<T>::pack_across_depth(data + p * ld + j, ld, rows, count), to);
        __builtin_prefetch(data + p * ld + j + kPanelCols);
      }
      continue;
    }
    float* to = panel + j;
    for (int64_t p = 0; p < depth; p += Vector::kLanes * kDepth) {
      const auto deep = static_cast<int>(std::min<int64_t>(depth - p, Vector::kLanes * kDepth));
      Vector rows[Vector::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vector::kLanes; ++i) {
        rows[i] = i < count ? Products<T>::pack_along_depth(data + (j + i) * ld + p, deep) : Vector::zero();
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

/// Packs the left operand in the order in which it lies: rows x depth, or depth x rows if it is transposed. Element (i, p)
/// of it stands at i * ld + p, or at i + p * ld. Returns the packed elements from row to row, or from depth to depth.
template <typename T>
int64_t pack_left(const T* data, int64_t ld, bool transposed, int64_t rows, int64_t depth, float* packed) {
  constexpr int kDepth = Products<T>::kDepth;
  if (transposed) {
    for (int64_t p = 0; p < depth; p += kDepth, packed += rows) {
      const auto deep = static_cast<int>(std::min<int64_t>(depth - p, kDepth));
      for (int64_t i = 0; i < rows; i += Vector::kLanes) {
        const auto count = static_cast<int>(std::min<int64_t>(rows - i, Vector::kLanes));
        store_partial(Products<T>::pack_across_depth(data + p * ld + i, ld, deep, count), packed + i, count);
      }
    }
    return rows;
  }
  const int64_t packed_ld = (depth + kDepth - 1) / kDepth;
  for (int64_t i = 0; i < rows; ++i, packed += packed_ld) {
    for (int64_t p = 0; p < packed_ld; p += Vector::kLanes) {
      const auto count = static_cast<int>(std::min<int64_t>(packed_ld - p, Vector::kLanes));
      const auto deep = static_cast<int>(std::min<int64_t>(depth - p * kDepth, Vector::kLanes * kDepth));
      store_partial(Products<T>::pack_along_depth(data + i * ld + p * kDepth, deep), packed + p, count);
    }
  }
  return packed_ld;
}

} // namespace
} // namespace blockdiag::cpu
