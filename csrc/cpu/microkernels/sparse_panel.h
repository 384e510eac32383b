// Products with a block-sparse matrix for more than a few rows of activations.
//
// A panel of rows is transposed, so that one feature of all rows is one or two vectors, and each weight a factor that is
// broadcast from where it lies: blocks of any shape keep the vectors full, and none is packed.
#pragma once

#include "element.h"
#include "thresholds.h"

namespace blockdiag::cpu {
namespace {

constexpr int kPanelVectors = kSparseRows / Vector::kLanes;
/// Vectors of sums, or of gradients, that stay in registers.
constexpr int kPanelFeatures = kWideVectors ? 16 : 4;

/// Transposes `rows` rows: feature f of row i to f * panel_ld + i, padded with zeros to whole vectors.
template <typename T>
void transpose_in(const T* data, int64_t ld, int64_t rows, int64_t features, float* panel, int64_t panel_ld) {
  for (int64_t first = 0; first < rows; first += Vector::kLanes) {
    for (int64_t f = 0; f < features; f += Vector::kLanes) {
      const auto count = static_cast<int>(std::min<int64_t>(features - f, Vector::kLanes));
      Vector square[Vector::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vector::kLanes; ++i) {
        square[i] = first + i < rows ? load_partial(data + (first + i) * ld + f, count) : Vector::zero();
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < Vector::kLanes; ++i) {
        if (i < count) {
          Vector::store(square[i], panel + (f + i) * panel_ld + first);
        }
      }
    }
  }
}

/// What is added to the sums of a product: bias(f) + diagonal(f) * activation(i, f mod features).
template <typename T>
struct Added {
  const T* bias;
  const T* diagonal;
  const T* activation; // rows are ld apart
  int64_t ld, features;

  Vector operator()(Vector sum, int64_t row, int64_t f, int count) const {
    if (bias != nullptr) {
      sum = sum + load_partial(bias + f, count);
    }
    if (diagonal != nullptr) {
      const T* const of_row = activation + row * ld;
      const int64_t at = f % features;
      const auto factor = load_partial(diagonal + f, count);
      if (at + count <= features) {
        sum = sum.plus_product(factor, load_partial(of_row + at, count));
      } else {
        float wrapped[Vector::kLanes];
        for (int lane = 0; lane < count; ++lane) {
          wrapped[lane] = static_cast<float>(of_row[(at + lane) % features]);
        }
        sum = sum.plus_product(factor, load_partial(wrapped, count));
      }
    }
    return sum;
  }
};

/// Transposes a panel of sums back, from feature `first` on, and rounds them: out(row + i, f), rows out_ld apart.
template <typename T>
void transpose_out(
    const float* panel, int64_t first, int64_t features, int64_t row, int64_t rows, const Added<T>& added, T* out,
    int64_t out_ld
) {
  for (int64_t f = 0; f < features; f += Vector::kLanes) {
    const auto count = static_cast<int>(std::min<int64_t>(features - f, Vector::kLanes));
    for (int64_t v = 0; v < rows; v += Vector::kLanes) {
      Vector square[Vector::kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < Vector::kLanes; ++i) {
        square[i] = i < count ? Vector::load(panel + (f + i) * kSparseRows + v) : Vector::zero();
      }
      transpose(square);
#pragma GCC unroll 16
      for (int i = 0; i < Vector::kLanes; ++i) {
        if (v + i < rows) {
          const int64_t at = row + v + i;
          store_partial(added(square[i], at, first + f, count), out + at * out_ld + first + f, count);
        }
      }
    }
  }
}

/// Blocks of one row of blocks, from `values` on.
struct BlockRow {
  const float* values;
  const int32_t* cols;
  int64_t count, in_block, block_size;
};

/// Sums over a row of blocks for kFeatures output features: sums(n) = sum over blocks and k of value(n, k) * panel(k).
/// kInBlock: in_block, or 0 for any.
template <int kFeatures, int kInBlock>
void gather(const BlockRow& row, const float* panel, float* result) {
  // Few sums would wait for each other: they are split into several, over blocks in turn.
  constexpr int kChains = std::max(1, (kWideVectors ? 8 : 4) / (kFeatures * kPanelVectors));
  const int64_t in_block = kInBlock > 0 ? kInBlock : row.in_block;
  Vector sums[kChains][kFeatures][kPanelVectors];
  for (auto& chain : sums) {
    for (auto& feature : chain) {
      for (auto& sum : feature) {
        sum = Vector::zero();
      }
    }
  }
  const float* values = row.values;
  const auto add = [&](auto& chain, int64_t j) __attribute__((always_inline)) {
    const float* x = panel + row.cols[j] * in_block * kSparseRows;
#pragma GCC unroll 4
    for (int64_t k = 0; k < in_block; ++k, x += kSparseRows) {
      Vector vectors[kPanelVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        vectors[v] = Vector::load(x + v * Vector::kLanes);
      }
#pragma GCC unroll 16
      for (int n = 0; n < kFeatures; ++n) {
        const auto value = Vector::broadcast(values[n * in_block + k]);
#pragma GCC unroll 2
        for (int v = 0; v < kPanelVectors; ++v) {
          chain[n][v] = chain[n][v].plus_product(value, vectors[v]);
        }
      }
    }
    values += row.block_size;
  };
  int64_t j = 0;
  for (; j + kChains <= row.count; j += kChains) {
#pragma GCC unroll 8
    for (int c = 0; c < kChains; ++c) {
      add(sums[c], j + c);
    }
  }
  if constexpr (kChains > 1) {
    for (; j < row.count; ++j) {
      add(sums[0], j);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < kFeatures; ++n) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      auto sum = sums[0][n][v];
#pragma GCC unroll 8
      for (int c = 1; c < kChains; ++c) {
        sum = sum + sums[c][n][v];
      }
      Vector::store(sum, result + n * kSparseRows + v * Vector::kLanes);
    }
  }
}

/// The transpose of gather: adds the products with kFeatures output features to a panel of input features.
template <int kFeatures, int kInBlock>
void scatter(const BlockRow& row, const float* grads, float* panel) {
  const int64_t in_block = kInBlock > 0 ? kInBlock : row.in_block;
  Vector factors[kFeatures][kPanelVectors];
#pragma GCC unroll 16
  for (int n = 0; n < kFeatures; ++n) {
#pragma GCC unroll 2
    for (int v = 0; v < kPanelVectors; ++v) {
      factors[n][v] = Vector::load(grads + n * kSparseRows + v * Vector::kLanes);
    }
  }
  const float* values = row.values;
  for (int64_t j = 0; j < row.count; ++j, values += row.block_size) {
    float* to = panel + row.cols[j] * in_block * kSparseRows;
#pragma GCC unroll 4
    for (int64_t k = 0; k < in_block; ++k, to += kSparseRows) {
#pragma GCC unroll 2
      for (int v = 0; v < kPanelVectors; ++v) {
        // Two sums: one would be a long chain.
        Vector sums[2] = {Vector::load(to + v * Vector::kLanes), Vector::zero()};
#pragma GCC unroll 16
        for (int n = 0; n < kFeatures; ++n) {
          const auto value = Vector::broadcast(values[n * in_block + k]);
          sums[n % 2] = sums[n % 2].plus_product(value, factors[n][v]);
        }
        Vector::store(kFeatures > 1 ? sums[0] + sums[1] : sums[0], to + v * Vector::kLanes);
      }
    }
  }
}

/// Calls function(integral constant of in_block, or of 0).
template <typename Function>
void with_in_block(int64_t in_block, const Function& function) {
  switch (in_block) {
    case 1:
      return function(std::integral_constant<int, 1>());
    case 4:
      return function(std::integral_constant<int, 4>());
    case 8:
      return function(std::integral_constant<int, 8>());
    case 16:
      return function(std::integral_constant<int, 16>());
    case 32:
      return function(std::integral_constant<int, 32>());
    default:
      return function(std::integral_constant<int, 0>());
  }
}

/// Splits the output features of a block into parts of at most kPanelFeatures, and calls function(first feature of the
/// block, integral constant of their number).
template <typename Function>
void for_each_part(int64_t out_block, const Function& function) {
  int64_t n = 0;
  for (; n + kPanelFeatures <= out_block; n += kPanelFeatures) {
    function(n, std::integral_constant<int, kPanelFeatures>());
  }
  if constexpr (kPanelFeatures > 8) {
    for (; n + 8 <= out_block; n += 8) {
      function(n, std::integral_constant<int, 8>());
    }
  }
  if constexpr (kPanelFeatures > 4) {
    for (; n + 4 <= out_block; n += 4) {
      function(n, std::integral_constant<int, 4>());
    }
  }
  for (; n < out_block; ++n) {
    function(n, std::integral_constant<int, 1>());
  }
}

} // namespace
} // namespace blockdiag::cpu
