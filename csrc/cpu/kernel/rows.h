// Products in which every element of the largest operand is used once or twice: they take as long as memory takes to read
// or write it, so that it is read and written row by row.
//
// For files that have chosen an instruction set; see headers.h.
#pragma once

#include "vector.h"

namespace blockdiag::cpu {
namespace {

/// out(i, j) = bias(j) + sum over p < depth of left(i, p) * right(j, p), each sum along a vector.
template <typename T>
void compute_dots(
    const T* left,
    int64_t left_ld,
    const T* right,
    int64_t right_ld,
    const T* bias,
    T* out,
    int64_t out_ld,
    int64_t rows,
    int64_t cols,
    int64_t depth
) {
  constexpr int kLanes = Vector::kLanes;
  for (int64_t j = 0; j < cols; j += kLanes) {
    const auto count = static_cast<int>(std::min<int64_t>(cols - j, kLanes));
    const T* starts[kLanes]; // of the right operand's rows; beyond the last one, its own again
    for (int r = 0; r < kLanes; ++r) {
      starts[r] = right + (j + std::min(r, count - 1)) * right_ld;
    }
    for (int64_t i = 0; i < rows; ++i) {
      Vector sums[kLanes];
#pragma GCC unroll 16
      for (auto& sum : sums) {
        sum = Vector::zero();
      }
      const auto add = [&](int64_t p, int deep) {
        const auto factor = load_partial(left + i * left_ld + p, deep);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; ++r) {
          sums[r] = sums[r].plus_product(factor, load_partial(starts[r] + p, deep));
        }
      };
      int64_t p = 0;
      for (; p + kLanes <= depth; p += kLanes) {
        add(p, kLanes);
      }
      if (p < depth) {
        add(p, static_cast<int>(depth - p));
      }
      transpose(sums);
      auto total = bias == nullptr ? Vector::zero() : load_partial(bias + j, count);
#pragma GCC unroll 16
      for (const auto& sum : sums) {
        total = total + sum;
      }
      store_partial(total, out + i * out_ld + j, count);
    }
  }
}

constexpr int64_t kLongRow = 4096;

/// out(i, j) = bias(j) + sum over p < depth of left(i, p) * right(p, j), for at most kLongRow columns. Element (i, p) of the
/// left operand stands at i * left_row_stride + p * left_depth_stride.
template <typename T>
void combine_rows(
    const T* left,
    int64_t left_row_stride,
    int64_t left_depth_stride,
    const T* right,
    int64_t right_ld,
    const T* bias,
    T* out,
    int64_t out_ld,
    int64_t rows,
    int64_t cols,
    int64_t depth
) {
  constexpr int kStreams = 8; // rows of the right operand that are read at once
  float sums[kLongRow];
  for (int64_t i = 0; i < rows; ++i, left += left_row_stride, out += out_ld) {
    for (int64_t p0 = 0; p0 < depth; p0 += kStreams) {
      const auto add = [&]<int kCount>(std::integral_constant<int, kCount> /*rows*/) {
        Vector factors[kCount];
#pragma GCC unroll 8
        for (int p = 0; p < kCount; ++p) {
          factors[p] = Vector::broadcast(static_cast<float>(left[(p0 + p) * left_depth_stride]));
        }
        const T* const first = right + p0 * right_ld;
        for (int64_t j = 0; j < cols; j += Vector::kLanes) {
          const auto count = static_cast<int>(std::min<int64_t>(cols - j, Vector::kLanes));
          Vector sum = p0 > 0            ? Vector::load(sums + j)
                       : bias == nullptr ? Vector::zero()
                                         : load_partial(bias + j, count);
#pragma GCC unroll 8
          for (int p = 0; p < kCount; ++p) {
            sum = sum.plus_product(factors[p], load_partial(first + p * right_ld + j, count));
          }
          if (p0 + kCount < depth) {
            Vector::store(sum, sums + j);
          } else {
            store_partial(sum, out + j, count);
          }
        }
      };
      switch (std::min<int64_t>(depth - p0, kStreams)) {
        case 1:
          add(std::integral_constant<int, 1>());
          break;
        case 2:
          add(std::integral_constant<int, 2>());
          break;
        case 3:
          add(std::integral_constant<int, 3>());
          break;
        case 4:
          add(std::integral_constant<int, 4>());
          break;
        case 5:
          add(std::integral_constant<int, 5>());
          break;
        case 6:
          add(std::integral_constant<int, 6>());
          break;
        case 7:
          add(std::integral_constant<int, 7>());
          break;
        default:
          add(std::integral_constant<int, kStreams>());
          break;
      }
    }
  }
}

} // namespace
} // namespace blockdiag::cpu
