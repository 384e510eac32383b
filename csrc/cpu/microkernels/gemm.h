// GEMM for more than a few rows, on panels of columns two vectors wide.
//
// The innermost loop is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): the
// sums stay in registers, a panel of the right operand stays in the L1 cache, and the left operand streams past.
// Libraries pack both operands, which pays off for large matrices. Blocks of a block-diagonal layer are small: the left
// operand is read in place if possible, and the right one if it is read only a few times.
#pragma once

#include "pack.h"
#include "sums.h"

namespace blockdiag::cpu {
namespace {

/// A few rows of one panel of the result: out(i, j) = added(i, j) + sum over p < depth of left(i, p) * right(p, j),
/// where left and right hold packed elements.
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
  int last_cols;      // in the last vector of each row
  int prefetch_lines; // of each row of left, kAheadRows in advance
};

inline Vector broadcast_packed(const char* data) {
  float packed;
  std::memcpy(&packed, data, sizeof(packed)); // pairs of half types may be less aligned than floats
  return Vector::broadcast(packed);
}

template <typename Packed, typename Out, int kRows, int kVectors, bool kLeftTransposed>
void gemm_strip(const Strip<Out>& strip) {
  Vector sums[kRows][kVectors];
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
        sums[i][v] = Packed::plus_product(sums[i][v], factor, row[v]);
      }
    }
    left += depth_stride;
    right += strip.right_ld;
  }
  // The fields are copied: as far as the compiler knows, a store may change them.
  const float* const added = strip.added;
  Out* const out = strip.out;
  const int64_t added_ld = strip.added_ld, out_ld = strip.out_ld;
  const int last_cols = strip.last_cols;
  const auto for_each_sum = [&](const auto& function) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        function(sums[i][v], i, v * Vector::kLanes, v + 1 < kVectors ? Vector::kLanes : last_cols);
      }
    }
  };
  const bool full = last_cols == Vector::kLanes;
  // Added last: over a long depth, sums of partial sums lose less precision than one long chain.
  if (added != nullptr && full) {
    for_each_sum([&](Vector& sum, int i, int col, int) { sum = sum + Vector::load(added + i * added_ld + col); });
  } else if (added != nullptr) {
    for_each_sum([&](Vector& sum, int i, int col, int count) {
      sum = sum + load_partial(added + i * added_ld + col, count);
    });
  }
  if (full) {
    for_each_sum([&](Vector& sum, int i, int col, int) { Vector::store(sum, out + i * out_ld + col); });
  } else {
    for_each_sum([&](Vector& sum, int i, int col, int count) { store_partial(sum, out + i * out_ld + col, count); });
  }
}

/// gemm_strip for each number of rows, from 1.
template <typename Packed, typename Out, int kVectors, bool kLeftTransposed, int... kRow>
constexpr auto strip_functions(std::integer_sequence<int, kRow...> /*rows*/) {
  return std::array{&gemm_strip<Packed, Out, kRow + 1, kVectors, kLeftTransposed>...};
}

/// Computes `rows` rows of a panel, split evenly into as few strips as possible.
template <typename Packed, typename Out, int kVectors, bool kLeftTransposed>
void gemm_strips(Strip<Out> strip, int64_t rows) {
  constexpr int kMaxRows = kLeftTransposed ? kStripRowsTransposed : kStripRows;
  static constexpr auto kFunctions =
      strip_functions<Packed, Out, kVectors, kLeftTransposed>(std::make_integer_sequence<int, kMaxRows>());
  for (int64_t strips = (rows + kMaxRows - 1) / kMaxRows; strips > 0; --strips) {
    const int64_t count = (rows + strips - 1) / strips;
    if (strip.prefetch_lines > 0) {
      for (int64_t i = kAheadRows; i < kAheadRows + count; ++i) {
        const char* const row = strip.left + i * strip.left_row_stride;
        for (int line = 0; line < strip.prefetch_lines; ++line) {
          __builtin_prefetch(row + line * kLineBytes);
        }
      }
    }
    kFunctions[static_cast<size_t>(count - 1)](strip);
    strip.left += count * strip.left_row_stride;
    strip.added += strip.added == nullptr ? 0 : count * strip.added_ld;
    strip.out += count * strip.out_ld;
    rows -= count;
  }
}

template <typename Packed, typename Out>
void gemm_panel(const Strip<Out>& strip, int64_t rows, int64_t cols, bool left_transposed) {
  if (cols <= Vector::kLanes) {
    left_transposed ? gemm_strips<Packed, Out, 1, true>(strip, rows) : gemm_strips<Packed, Out, 1, false>(strip, rows);
  } else {
    left_transposed ? gemm_strips<Packed, Out, 2, true>(strip, rows) : gemm_strips<Packed, Out, 2, false>(strip, rows);
  }
}

/// One tile of one block: left (b) is rows x depth, right (a) is depth x cols.
template <typename Half, typename Left, typename Right, typename Out>
struct Tile {
  const Left* left;
  const Right* right;
  Elements<Half> bias;
  Out* out;
  int64_t rows, cols;
  float* sums;      // rows x cols, for what Out cannot hold; null if it can
  double* row_sums; // left's rows are added up into them; null if not
};

/// The tiles of a GEMM, a part of the depth at a time.
template <typename Packed, typename Half, typename Left, typename Right, typename Out>
struct TileProduct {
  static constexpr int kDepth = Packed::kDepth;
  static constexpr int64_t kPartDepth = kPanelDepth * kDepth;

  const Gemm& gemm;
  // A transposed left operand is read across its rows: packing pays off if that happens often, or if each time the rows
  // evict each other from the first cache, or come from pages of their own.
  const bool cheap_across =
      gemm.m <= kPanelCols ? !is_spread(gemm.k, gemm.b.ld) : gemm.m < kTile && !is_large(gemm.k, gemm.b.ld);
  const bool in_place =
      Packed::template kReadInPlace<Left> && (gemm.b.transpose ? kDepth == 1 && cheap_across : gemm.k % kDepth == 0);
  const bool prefetch_left =
      gemm.b.transpose ? wants_prefetch(gemm.k, gemm.n, gemm.b.ld) : wants_prefetch(gemm.n, gemm.k, gemm.b.ld);
  const bool prefetch_right = wants_prefetch(gemm.k, gemm.m, gemm.a.ld);
  // Partial sums between panels along the depth are float32, which a half type cannot hold.
  const bool sum_apart = !std::is_same_v<Out, float> && gemm.k > kPartDepth;

  /// Floats of scratch memory for a tile of so many rows.
  int64_t packed_size(int64_t rows) const { return in_place ? 0 : rows * std::min(gemm.k, kPanelDepth); }

  /// Adds the products from p0 on, kPartDepth of them.
  void add_part(const Tile<Half, Left, Right, Out>& tile, int64_t p0, float* packed_left) const {
    const int64_t rows = tile.rows;
    const int64_t depth = std::min(kPartDepth, gemm.k - p0);
    const Left* const left_part = tile.left + (gemm.b.transpose ? p0 * gemm.b.ld : p0);
    const auto* left_data = reinterpret_cast<const char*>(left_part);
    int64_t left_stride = gemm.b.ld * static_cast<int64_t>(sizeof(Left));
    if (!in_place) {
      left_stride = pack_left<Packed>(left_part, gemm.b.ld, gemm.b.transpose, rows, depth, prefetch_left, packed_left) *
                    sizeof(float);
      left_data = reinterpret_cast<const char*>(packed_left);
    }
    if (tile.row_sums != nullptr) {
      add_over_depth(left_part, gemm.b.ld, rows, depth, tile.row_sums);
    }
    alignas(64) float panel[kPanelDepth * kPanelCols];
    alignas(64) float bias_panel[kPanelCols];
    for (int64_t j = 0; j < tile.cols; j += kPanelCols) {
      const int64_t width = std::min<int64_t>(tile.cols - j, kPanelCols);
      const Right* const right_part = tile.right + (gemm.a.transpose ? j * gemm.a.ld + p0 : p0 * gemm.a.ld + j);
      const float* right_data = panel;
      int64_t right_ld = kPanelCols;
      if constexpr (kDepth == 1 && Packed::template kReadInPlace<Right>) {
        const bool small = rows <= kInPlaceRows || gemm.a.ld <= kInPlaceLd;
        const bool one_line = gemm.m * static_cast<int64_t>(sizeof(Right)) <= kLineBytes;
        const bool spread = prefetch_right && !one_line && is_spread(gemm.k, gemm.a.ld);
        if (small && !spread && !gemm.a.transpose && width % Vector::kLanes == 0) { // vectors are full
          right_data = right_part;
          right_ld = gemm.a.ld;
        }
      }
      if (right_data == panel) {
        pack_right<Packed>(right_part, gemm.a.ld, gemm.a.transpose, depth, width, prefetch_right, panel);
      }
      // The first panel brings the left operand into the cache.
      const int left_lines = j == 0 ? static_cast<int>((gemm.k * sizeof(Left) + kLineBytes - 1) / kLineBytes) : 0;
      const auto compute = [&]<typename To>(To* to, int64_t to_ld) {
        const float* added = nullptr;
        int64_t added_ld = 0;
        if (p0 > 0) {
          if constexpr (std::is_same_v<To, float>) {
            added = to;
            added_ld = to_ld;
          }
        } else if (tile.bias) {
          for (int64_t col = 0; col < width; col += Vector::kLanes) {
            const auto count = static_cast<int>(std::min<int64_t>(width - col, Vector::kLanes));
            Vector::store(tile.bias.load(j + col, count), bias_panel + col);
          }
          added = bias_panel;
        }
        const Strip<To> strip{
            .left = left_data,
            .left_row_stride = gemm.b.transpose ? static_cast<int64_t>(sizeof(float)) : left_stride,
            .left_depth_stride = gemm.b.transpose ? left_stride : static_cast<int64_t>(sizeof(float)),
            .right = right_data,
            .right_ld = right_ld,
            .depth = (depth + kDepth - 1) / kDepth,
            .added = added,
            .added_ld = added_ld,
            .out = to,
            .out_ld = to_ld,
            .last_cols = static_cast<int>(width > Vector::kLanes ? width - Vector::kLanes : width),
            .prefetch_lines = !gemm.b.transpose && in_place && prefetch_left ? left_lines : 0,
        };
        gemm_panel<Packed>(strip, rows, width, gemm.b.transpose);
      };
      if (tile.sums != nullptr) {
        compute(tile.sums + j, tile.cols);
      } else {
        compute(tile.out + j, gemm.c.ld);
      }
    }
  }

  /// Rounds the sums of a tile that has been summed apart.
  void store_sums(const Tile<Half, Left, Right, Out>& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      for (int64_t j = 0; j < tile.cols; j += Vector::kLanes) {
        const auto count = static_cast<int>(std::min<int64_t>(tile.cols - j, Vector::kLanes));
        store_partial(load_partial(tile.sums + i * tile.cols + j, count), tile.out + i * gemm.c.ld + j, count);
      }
    }
  }
};

} // namespace
} // namespace blockdiag::cpu
