// Our own GEMM, with float32 sums, for the instruction set of the file that includes this. Half types are rounded once, when
// they are stored.
//
// For files that have chosen an instruction set; see headers.h.
#pragma once

#include "panels.h"
#include "rows.h"

namespace blockdiag::cpu {
namespace {

/// How the work is shared out: every tile of the result is one task. A sum is never split, so results do not depend on the
/// number of threads; the price is that a single small block occupies a single thread, however long its sums are.
struct Tiles {
  int64_t rows, cols;
  int64_t row_count, col_count, count;

  Tiles(const Gemm& gemm, int64_t max_rows, int64_t max_cols)
      : rows(std::min(gemm.n, max_rows)), cols(std::min(gemm.m, max_cols)) {
    const auto update = [&] {
      row_count = (gemm.n + rows - 1) / rows;
      col_count = (gemm.m + cols - 1) / cols;
      count = gemm.batch * row_count * col_count;
    };
    update();
    // A few for each thread. By columns first: what a panel of the right operand costs is then not paid again.
    const int64_t threads = at::get_num_threads();
    const auto uneven = [&] { return count < 4 * threads && count % threads != 0; };
    while (uneven() && cols > kPanelCols) {
      cols = (cols / 2 + kPanelCols - 1) / kPanelCols * kPanelCols;
      update();
    }
    while (uneven() && rows > 2 * Vector::kMaxRows) {
      rows = (rows + 1) / 2;
      update();
    }
  }

  /// Calls compute(block, first row, rows, first column, columns) for every tile; many one after another in one thread, if
  /// they are of fewer products than `min_products`, which are worth waking a thread for.
  template <typename Compute>
  void for_each(const Gemm& gemm, int64_t min_products, const Compute& compute) const {
    // Narrow blocks share cache lines of the activations, so all blocks of some rows come before the next rows, if the right
    // operands of all of them stay in the L2 cache meanwhile.
    constexpr int64_t kCached = 1 << 16;
    const bool blocks_first = gemm.batch * gemm.m * gemm.k <= kCached;
    const int64_t grain = std::max<int64_t>(min_products / (rows * cols * gemm.k), 1);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t outer = task / col_count;
        const int64_t block = blocks_first ? outer % gemm.batch : outer / row_count;
        const int64_t i = (blocks_first ? outer / gemm.batch : outer % row_count) * rows;
        const int64_t j = task % col_count * cols;
        compute(block, i, std::min(rows, gemm.n - i), j, std::min(cols, gemm.m - j));
      }
    });
  }
};

constexpr int64_t kTile = 256; // rows and columns

/// One tile of one block: left (b) is rows x depth, right (a) is depth x cols.
template <typename T>
void compute_tile(const Gemm& gemm, const T* left, const T* right, const T* bias, T* out, int64_t rows, int64_t cols) {
  constexpr int kDepth = Products<T>::kDepth;
  constexpr bool kHalf = !std::is_same_v<T, float>;
  // Transposed, the left operand is read across its rows: a copy pays if that happens many times.
  const bool in_place =
      Products<T>::kReadInPlace && (gemm.b.transpose ? kDepth == 1 && gemm.m < kTile : gemm.k % kDepth == 0);
  // What a half type cannot hold between two panels along the depth.
  const bool sum_apart = kHalf && gemm.k > kPanelDepth * kDepth;

  alignas(64) float panel[kPanelDepth * kPanelCols];
  alignas(64) float bias_panel[kPanelCols];
  const size_t left_size = in_place ? 0 : rows * std::min(gemm.k, kPanelDepth);
  const size_t sums_size = sum_apart ? rows * cols : 0;
  c10::DataPtr scratch;
  if (left_size + sums_size > 0) {
    scratch = c10::GetCPUAllocator()->allocate((left_size + sums_size) * sizeof(float));
  }
  auto* const packed_left = static_cast<float*>(scratch.get());
  float* const sums = packed_left + left_size;

  for (int64_t p0 = 0; p0 < gemm.k; p0 += kPanelDepth * kDepth) {
    const int64_t depth = std::min(kPanelDepth * kDepth, gemm.k - p0);
    const T* const left_part = left + (gemm.b.transpose ? p0 * gemm.b.ld : p0);
    const auto* left_data = reinterpret_cast<const char*>(left_part);
    int64_t left_stride = gemm.b.ld * static_cast<int64_t>(sizeof(T));
    if (!in_place) {
      left_stride = pack_left(left_part, gemm.b.ld, gemm.b.transpose, rows, depth, packed_left) * sizeof(float);
      left_data = reinterpret_cast<const char*>(packed_left);
    }
    for (int64_t j = 0; j < cols; j += kPanelCols) {
      const int64_t width = std::min<int64_t>(cols - j, kPanelCols);
      const T* const right_part = right + (gemm.a.transpose ? j * gemm.a.ld + p0 : p0 * gemm.a.ld + j);
      const float* right_data = panel;
      int64_t right_ld = kPanelCols;
      if constexpr (!kHalf) {
        // In place, if that reads full vectors, and is done a few times only or does not reach far.
        if (!gemm.a.transpose && width % Vector::kLanes == 0 && (rows <= 4 * Vector::kMaxRows || gemm.a.ld <= kTile)) {
          right_data = right_part;
          right_ld = gemm.a.ld;
        }
      }
      if (right_data == panel) {
        pack_panel(right_part, gemm.a.ld, gemm.a.transpose, depth, width, panel);
      }
      const auto compute = [&]<typename Out>(Out* to, int64_t to_ld) {
        const float* added = nullptr;
        int64_t added_ld = 0;
        if (p0 > 0) {
          if constexpr (std::is_same_v<Out, float>) {
            added = to;
            added_ld = to_ld;
          }
        } else if (bias != nullptr) {
          for (int64_t col = 0; col < width; col += Vector::kLanes) {
            const auto count = static_cast<int>(std::min<int64_t>(width - col, Vector::kLanes));
            Vector::store(load_partial(bias + j + col, count), bias_panel + col);
          }
          added = bias_panel;
        }
        const Strip<Out> strip{
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
        };
        compute_panel<T>(strip, rows, width, gemm.b.transpose);
      };
      if (sum_apart) {
        compute(sums + j, cols);
      } else {
        compute(out + j, gemm.c.ld);
      }
    }
  }
  if (sum_apart) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; j += Vector::kLanes) {
        const auto count = static_cast<int>(std::min<int64_t>(cols - j, Vector::kLanes));
        store_partial(load_partial(sums + i * cols + j, count), out + i * gemm.c.ld + j, count);
      }
    }
  }
}

/// A Kernel. In row-major terms, C's rows are its columns: left = B is n x k, right = A is k x m, and `transpose` says that
/// an operand's depth does not come in the order in which it is multiplied.
template <typename T>
void run(const Gemm& gemm, const T* a, const T* b, T* c, const T* bias) {
  constexpr int64_t kFewRows = 2, kShallow = 4, kWide = 512;
  const auto left_at = [&](int64_t block, int64_t i) {
    return b + block * gemm.b.stride + i * (gemm.b.transpose ? 1 : gemm.b.ld);
  };
  const auto right_at = [&](int64_t block, int64_t j) {
    return a + block * gemm.a.stride + j * (gemm.a.transpose ? gemm.a.ld : 1);
  };
  const auto bias_at = [&](int64_t block, int64_t j) { return bias == nullptr ? nullptr : bias + block * gemm.m + j; };
  const auto out_at = [&](int64_t block, int64_t i, int64_t j) {
    return c + block * gemm.c.stride + i * gemm.c.ld + j;
  };
  const auto few_rows_at = [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
    return FewRows<T>{
        .left = left_at(block, i),
        .left_row_stride = gemm.b.transpose ? 1 : gemm.b.ld,
        .left_depth_stride = gemm.b.transpose ? gemm.b.ld : 1,
        .right = right_at(block, j),
        .right_ld = gemm.a.ld,
        .bias = bias_at(block, j),
        .out = out_at(block, i, j),
        .out_ld = gemm.c.ld,
        .rows = rows,
        .cols = cols,
        .depth = gemm.k,
    };
  };
  const bool few_rows = gemm.n <= kFewRows;
  // With few rows the right operand comes from memory for each product: then a thread is worth waking for fewer of them.
  const int64_t min_products = few_rows ? 1 << 17 : 1 << 18;
  if (few_rows && gemm.a.transpose && !gemm.b.transpose) {
    Tiles(gemm, kTile, kTile)
        .for_each(gemm, min_products, [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
          const auto part = few_rows_at(block, i, rows, j, cols);
          gemm.k <= kTile ? compute_dots<true>(part) : compute_dots<false>(part);
        });
  } else if (!gemm.a.transpose && (few_rows || (gemm.k <= kShallow && gemm.m >= kWide))) {
    Tiles(gemm, kTile, kLongRow)
        .for_each(gemm, min_products, [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
          combine_rows(few_rows_at(block, i, rows, j, cols));
        });
  } else {
    Tiles(gemm, kTile, kTile)
        .for_each(gemm, min_products, [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
          compute_tile(gemm, left_at(block, i), right_at(block, j), bias_at(block, j), out_at(block, i, j), rows, cols);
        });
  }
}

} // namespace
} // namespace blockdiag::cpu
