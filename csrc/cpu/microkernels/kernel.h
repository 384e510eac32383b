// Our own GEMM with float32 sums, for the instruction set of the including file. Half types are rounded once, on store.
#pragma once

#include "gemm.h"
#include "gemv.h"

namespace blockdiag::cpu {
namespace {

/// Every tile of the result is one task. A sum is never split, so results do not depend on the number of threads. The
/// price: a single small block keeps only one thread busy, however long its sums are.
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
    // A few tiles per thread. Columns are split first, so that no panel of the right operand is packed again.
    const int64_t threads = at::get_num_threads();
    const auto uneven = [&] { return count < 4 * threads && count % threads != 0; };
    while (uneven() && cols > kPanelCols) {
      cols = (cols / 2 + kPanelCols - 1) / kPanelCols * kPanelCols;
      update();
    }
    while (uneven() && rows > 2 * kStripRowsTransposed) {
      rows = (rows + 1) / 2;
      update();
    }
  }

  /// Calls compute(begin, end) for all tiles from begin to end. Threads get several tiles each if one has fewer than
  /// `min_products` products, too few to wake a thread for.
  template <typename Compute>
  void for_ranges(const Gemm& gemm, int64_t min_products, const Compute& compute) const {
    const int64_t grain = std::max<int64_t>(min_products / (rows * cols * gemm.k), 1);
    at::parallel_for(0, count, grain, compute);
  }

  /// Calls compute(block, first row, rows, first column, columns) for a tile.
  template <typename Compute>
  void at(const Gemm& gemm, int64_t index, const Compute& compute) const {
    // Narrow blocks share cache lines of the activations: all blocks of some rows come before the next rows, provided
    // that all their right operands stay in the L2 cache.
    constexpr int64_t kCached = 1 << 16;
    const bool blocks_first = gemm.batch * gemm.m * gemm.k <= kCached;
    const int64_t outer = index / col_count;
    const int64_t block = blocks_first ? outer % gemm.batch : outer / row_count;
    const int64_t i = (blocks_first ? outer / gemm.batch : outer % row_count) * rows;
    const int64_t j = index % col_count * cols;
    compute(block, i, std::min(rows, gemm.n - i), j, std::min(cols, gemm.m - j));
  }

  /// The same for every tile.
  template <typename Compute>
  void for_each(const Gemm& gemm, int64_t min_products, const Compute& compute) const {
    for_ranges(gemm, min_products, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        at(gemm, index, compute);
      }
    });
  }
};

/// A Kernel. In row-major terms, C's columns are rows: left = B is n x k, right = A is k x m, and `transpose` means
/// that an operand is stored the other way, k x n or m x k.
template <typename Packed, typename Half, typename Left, typename Right, typename Out>
void run(const GemmProblem& problem, const Operands& operands) {
  const auto& gemm = problem.gemm;
  const auto elements = [](const void* data, bool half) {
    return Elements<Half>{
        .single = half ? nullptr : static_cast<const float*>(data),
        .half = half ? static_cast<const Half*>(data) : nullptr,
    };
  };
  const auto bias = elements(operands.bias, !std::is_same_v<Half, float> && !problem.float32.bias);
  const auto left_at = [&](int64_t block, int64_t i) {
    return static_cast<const Left*>(operands.b) + block * gemm.b.stride + i * (gemm.b.transpose ? 1 : gemm.b.ld);
  };
  const auto right_at = [&](int64_t block, int64_t j) {
    return static_cast<const Right*>(operands.a) + block * gemm.a.stride + j * (gemm.a.transpose ? gemm.a.ld : 1);
  };
  const auto bias_at = [&](int64_t block, int64_t j) { return bias + (block * gemm.m + j); };
  const auto out_at = [&](int64_t block, int64_t i, int64_t j) {
    return static_cast<Out*>(operands.c) + block * gemm.c.stride + i * gemm.c.ld + j;
  };
  const auto wants_row_sums = [&](int64_t j) { return problem.epilogue.bias_grad && j == 0; };
  const auto store_row_sums = [&](int64_t block, int64_t i, int64_t rows, const double* sums) {
    Out* const to = static_cast<Out*>(operands.bias_grad) + block * gemm.n + i;
    for (int64_t row = 0; row < rows; ++row) {
      to[row] = static_cast<Out>(static_cast<float>(sums[row]));
    }
  };
  const auto with_few_rows = [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols, const auto& compute) {
    const auto* const left = left_at(block, i);
    const FewRows<Half, Right, Out> part{
        .left = elements(left, !std::is_same_v<Left, float>),
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
    compute(part, left);
    if (wants_row_sums(j)) {
      double sums[kTile] = {};
      add_over_depth(left, gemm.b.ld, rows, gemm.k, sums);
      store_row_sums(block, i, rows, sums);
    }
  };
  const bool few_rows = gemm.n <= kFewRows;
  // A single column lies in memory as a row does: whether it counts as transposed is a matter of its description.
  const bool right_rows = gemm.a.transpose || (gemm.m == 1 && gemm.a.ld == 1);
  const bool few_cols = gemm.m <= kFewRows && gemm.k >= 2 * Vector::kLanes && !problem.epilogue.bias_grad;
  const int64_t min_products = few_rows ? kThreadProductsFewRows : kThreadProducts;
  if (right_rows && !gemm.b.transpose && computes_by_dots<Packed>(gemm.n, gemm.k)) {
    const bool from_memory = gemm.batch * gemm.m * gemm.k * static_cast<int64_t>(sizeof(Right)) > kCacheBytes;
    Tiles(gemm, kTile, kTile)
        .for_each(gemm, kThreadProductsFewRows, [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
          with_few_rows(block, i, rows, j, cols, [&](const auto& part, const Left* left) {
            const auto compute_as =
                [&]<bool kFromMemory>(std::bool_constant<kFromMemory>, const auto* elements, int64_t ld) {
                  if (rows == 1) {
                    dot_products<Packed, 1, kFromMemory>(part, elements, ld);
                  } else if (rows == 2) {
                    dot_products<Packed, 2, kFromMemory>(part, elements, ld);
                  } else {
                    dot_products<Packed, 4, kFromMemory>(part, elements, ld);
                  }
                };
            const auto compute = [&](const auto* elements, int64_t ld) {
              from_memory ? compute_as(std::true_type(), elements, ld) : compute_as(std::false_type(), elements, ld);
            };
            if (rows <= kFewRows || Packed::template kReadInPlace<Left>) {
              compute(left, gemm.b.ld);
            } else {
              const int64_t packed_ld = (gemm.k + Packed::kDepth - 1) / Packed::kDepth;
              const auto packed = c10::GetCPUAllocator()->allocate(rows * packed_ld * sizeof(float));
              auto* const to = static_cast<float*>(packed.get());
              pack_left<Packed>(left, gemm.b.ld, /*transposed=*/false, rows, gemm.k, /*prefetch=*/false, to);
              compute(reinterpret_cast<const typename Packed::Element*>(to), packed_ld * Packed::kDepth);
            }
          });
        });
  } else if (right_rows && !gemm.b.transpose && few_cols) {
    // The same with the operands exchanged.
    Tiles(gemm, kTile, kTile)
        .for_each(gemm, kThreadProductsFewRows, [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
          float sums[kFewRows * kTile];
          const FewRows<Half, Left, float> part{
              .left = elements(right_at(block, j), !std::is_same_v<Right, float>),
              .left_row_stride = gemm.a.ld,
              .left_depth_stride = 1,
              .right = left_at(block, i),
              .right_ld = gemm.b.ld,
              .bias = {},
              .out = sums,
              .out_ld = rows,
              .rows = cols,
              .cols = rows,
              .depth = gemm.k,
          };
          cols == 1 ? dot_products<Packed, 1, false>(part, right_at(block, j), gemm.a.ld)
                    : dot_products<Packed, 2, false>(part, right_at(block, j), gemm.a.ld);
          const auto bias = bias_at(block, j);
          for (int64_t row = 0; row < rows; ++row) {
            for (int64_t col = 0; col < cols; ++col) {
              const float sum = sums[col * rows + row];
              out_at(block, i + row, j)[col] = static_cast<Out>(bias ? sum + bias[col] : sum);
            }
          }
        });
  } else if (!gemm.a.transpose && (few_rows || (gemm.k <= kShallow && gemm.m >= kWide))) {
    Tiles(gemm, kTile, kLongRow)
        .for_each(gemm, min_products, [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
          with_few_rows(block, i, rows, j, cols, [](const auto& part, auto /*left*/) { gemv(part); });
        });
  } else {
    const TileProduct<Packed, Half, Left, Right, Out> product{gemm};
    const Tiles tiles(gemm, kTile, kTile);
    const int64_t sums_size = tiles.rows * tiles.cols;
    const bool parts = gemm.k > product.kPartDepth;
    const int64_t max_group = parts ? std::max<int64_t>(kGroupSums / sums_size, 1) : 1;
    tiles.for_ranges(gemm, min_products, [&](int64_t begin, int64_t end) {
      const int64_t group = std::min(max_group, end - begin);
      const int64_t row_sums_size = problem.epilogue.bias_grad ? group * tiles.rows : 0;
      const int64_t floats = product.packed_size(tiles.rows) + (product.sum_apart ? group * sums_size : 0);
      c10::DataPtr scratch;
      if (row_sums_size + floats > 0) {
        scratch = c10::GetCPUAllocator()->allocate(row_sums_size * sizeof(double) + floats * sizeof(float));
      }
      auto* const row_sums = static_cast<double*>(scratch.get());
      auto* const sums = reinterpret_cast<float*>(row_sums + row_sums_size);
      float* const packed_left = sums + (product.sum_apart ? group * sums_size : 0);
      for (int64_t first = begin; first < end; first += group) {
        const auto for_each_tile = [&](const auto& function) {
          for (int64_t index = first; index < std::min(first + group, end); ++index) {
            tiles.at(gemm, index, [&](int64_t block, int64_t i, int64_t rows, int64_t j, int64_t cols) {
              const Tile<Half, Left, Right, Out> tile{
                  .left = left_at(block, i),
                  .right = right_at(block, j),
                  .bias = bias_at(block, j),
                  .out = out_at(block, i, j),
                  .rows = rows,
                  .cols = cols,
                  .sums = product.sum_apart ? sums + (index - first) * sums_size : nullptr,
                  .row_sums = wants_row_sums(j) ? row_sums + (index - first) * tiles.rows : nullptr,
              };
              function(tile, block, i);
            });
          }
        };
        std::fill_n(row_sums, row_sums_size, 0.0);
        for (int64_t p0 = 0; p0 < gemm.k; p0 += product.kPartDepth) {
          for_each_tile([&](const auto& tile, int64_t /*block*/, int64_t /*i*/) {
            product.add_part(tile, p0, packed_left);
          });
        }
        for_each_tile([&](const auto& tile, int64_t block, int64_t i) {
          if (tile.sums != nullptr) {
            product.store_sums(tile);
          }
          if (tile.row_sums != nullptr) {
            store_row_sums(block, i, tile.rows, tile.row_sums);
          }
        });
      }
    });
  }
}

/// The kernel for a problem of a half type, in which matrices may be float32.
template <typename Packed, typename Half>
Kernel find_kernel(const Float32& float32) {
  const auto& [right, left, out, bias] = float32;
  if (out) {
    return left ? (right ? nullptr : run<Packed, Half, float, Half, float>)
                : (right ? run<Packed, Half, Half, float, float> : run<Packed, Half, Half, Half, float>);
  }
  return left ? (right ? run<Packed, Half, float, float, Half> : run<Packed, Half, float, Half, Half>)
              : (right ? run<Packed, Half, Half, float, Half> : run<Packed, Half, Half, Half, Half>);
}

/// The kernel in float32 arithmetic.
inline Kernel find_kernel(const GemmProblem& problem) {
  switch (problem.dtype) {
    case DType::kFloat32:
      return run<Floats, float, float, float, float>;
    case DType::kBFloat16:
      return find_kernel<Floats, c10::BFloat16>(problem.float32);
    case DType::kFloat16:
      return find_kernel<Floats, c10::Half>(problem.float32);
    default:
      return nullptr;
  }
}

} // namespace
} // namespace blockdiag::cpu
