// Small blocks: the sum over the batch that is a weight's gradient, with the bias's.
#pragma once

#include "small_blocks_memory.h"

namespace blockdiag::cuda {
namespace {

// A sum over the batch: C[j, i] = sum over l of Y[l, j] X[l, i], row-major. Y's columns are the rows of the mma's A,
// X's the columns of its B, and the mma sums over l: pairs of rows of the batch share a register, so a thread
// interleaves two rows. Thread r has kJ and kI neighboring columns; an mma uses one (of X) or two (of Y) from each
// thread.
//
// A thread block has one 32 x 32 tile of C, in one block of the weight, and every `parts`-th tile of 16 rows of the
// batch, distributed over its warps. The warps' sums are added in order in shared memory, and those of several thread
// blocks in order by a second kernel: no atomics, so equal calls give equal bits.

constexpr int kSumWarps = 8; // per thread block, at most

/// Tiles in flight per warp: up to 4 KiB. One if its elements are read one by one, which takes long enough.
template <typename A, typename T, int kI, int kJ, bool kWide>
constexpr int kSumAhead = kWide ? 32 / (kI * sizeof(A) + kJ * sizeof(T)) : 1;

// The layout of one share's sums: for each of the kJ rows and both halves of a thread's 2 kI columns, a vector of kI
// from each thread; then the sums of Y's columns.
constexpr int kPad = 16; // floats: two halves are read together, from different banks

template <int kI, int kJ>
constexpr int kColumnSums = kJ * 2 * (32 * kI + kPad); // their offset

template <int kI, int kJ>
constexpr int kShareFloats = kColumnSums<kI, kJ> + 8 * kJ;

/// Vectors and column sums in a share.
template <int kJ>
constexpr int kShareVectors = kJ * 64 + 8 * kJ;

/// Tile `index` of a launch: its block, and its first column and row in C.
struct Tile {
  int64_t block;
  int i, j;
};

__device__ __forceinline__ Tile tile_of(const Problem& p, unsigned index) {
  const unsigned tile = index % (p.tiles_i * p.tiles_j);
  return {
      index / (p.tiles_i * p.tiles_j), static_cast<int>(tile % p.tiles_i * 32), static_cast<int>(tile / p.tiles_i * 32)
  };
}

template <int N>
__device__ __forceinline__ Vector<float, N> add_vectors(const float* from, int64_t step, int64_t count) {
  Vector<float, N> total = {};
  for (int64_t i = 0; i < count; ++i) {
    const auto vector = read<Vector<float, N>>(from + i * step, true);
    for (int j = 0; j < N; ++j) {
      total.at[j] += vector.at[j];
    }
  }
  return total;
}

/// Adds up one vector of `count` shares, `step` floats apart, in order. Writes it to `to`, or to the results if that is
/// null. Vectors with neighboring indices are neighbors in C.
template <typename T, int kI, int kJ>
__device__ void add_shares(
    const Problem& p, const Tile& tile, int index, const float* from, int64_t step, int64_t count, float* to
) {
  const int row = index / 64, lane = index / 2 % 32, e = index % 2;
  if (row < kJ) {
    const int at = (row * 2 + e) * (32 * kI + kPad) + lane * kI;
    const auto total = add_vectors<kI>(from + at, step, count);
    if (to != nullptr) {
      write(to + at, total, true);
      return;
    }
    const int i = tile.i + kI * (2 * (lane % 4) + e), j = tile.j + kJ * (lane / 4) + row;
    with_result<T>(p, p.c, [&](auto* c) {
      c += tile.block * p.gemm.c.stride + j * p.gemm.c.ld;
      store(c, i, static_cast<int>(p.gemm.m), total.at, p.wide_c, j < p.gemm.n);
    });
  } else if (const int column = index - kJ * 64; p.bias_grad != nullptr && tile.i == 0 && tile.j + column < p.gemm.n) {
    const int at = kColumnSums<kI, kJ> + column;
    const auto total = add_vectors<1>(from + at, step, count);
    if (to != nullptr) {
      write(to + at, total, true);
      return;
    }
    with_result<T>(p, p.bias_grad, [&](auto* bias_grad) {
      using E = std::remove_pointer_t<decltype(bias_grad)>;
      write(bias_grad + tile.block * p.gemm.n + tile.j + column, E(total.at[0]), true);
    });
  }
}

/// X is stored as A: T, or float32, which is rounded to T.
template <typename T, typename A, int kI, int kJ, bool kWide>
__global__ void __launch_bounds__(kSumWarps * 32, 2) sum_kernel(const Problem p) {
  constexpr int kAhead = kSumAhead<A, T, kI, kJ, kWide>;
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int shares = blockDim.x / 32, share = threadIdx.x / 32;
  const int m = static_cast<int>(p.gemm.m), n = static_cast<int>(p.gemm.n);
  const Tile tile = tile_of(p, blockIdx.x);
  const int64_t part = blockIdx.y, step = p.parts * shares * 16;
  // Of the next tile of rows to sum, and of the next one to read.
  int64_t first = (part * shares + share) * 16, row = first + q;
  const A* a = static_cast<const A*>(p.a) + tile.block * p.gemm.a.stride + row * p.gemm.a.ld;
  const T* b = static_cast<const T*>(p.b) + tile.block * p.gemm.b.stride + row * p.gemm.b.ld;

  Elements<A, kI> x[kAhead][4];
  Elements<T, kJ> y[kAhead][4];
  const auto load_next = [&](int ahead) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool valid = row + 4 * i < p.gemm.k;
      x[ahead][i] = load<A, kI, kWide>(a + 4 * i * p.gemm.a.ld, tile.i + r * kI, m, valid);
      y[ahead][i] = load<T, kJ, kWide>(b + 4 * i * p.gemm.b.ld, tile.j + r * kJ, n, valid);
    }
    row += step;
    a += step * p.gemm.a.ld;
    b += step * p.gemm.b.ld;
  };
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    load_next(ahead);
  }
  float sums[kJ / 2][kI][4] = {}, column_sums[kJ / 2][4] = {};
  const bool sum_columns = p.bias_grad != nullptr && tile.i == 0;
  constexpr uint32_t kOnes = std::is_same_v<T, c10::Half> ? 0x3c003c00 : 0x3f803f80;
  while (first < p.gemm.k) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead, first += step) {
      if (first >= p.gemm.k) {
        break;
      }
      const auto& rx = x[ahead];
      const auto& ry = y[ahead];
#pragma unroll
      for (int u = 0; u < kJ; u += 2) {
        const uint32_t left[4] = {
            pair<T>(ry[0], ry[1], u), pair<T>(ry[0], ry[1], u + 1), pair<T>(ry[2], ry[3], u),
            pair<T>(ry[2], ry[3], u + 1)
        };
#pragma unroll
        for (int t = 0; t < kI; ++t) {
          mma<T>(sums[u / 2][t], left, {pair<T>(rx[0], rx[1], t), pair<T>(rx[2], rx[3], t)});
        }
        if (sum_columns) {
          mma<T>(column_sums[u / 2], left, {kOnes, kOnes}); // each of its columns is the sum
        }
      }
      load_next(ahead);
    }
  }

  constexpr int kFloats = kShareFloats<kI, kJ>;
  float* const shared = shared_memory() + share * kFloats;
#pragma unroll
  for (int row = 0; row < kJ; ++row) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Vector<float, kI> vector;
      for (int t = 0; t < kI; ++t) {
        vector.at[t] = sums[row / 2][t][row % 2 * 2 + e];
      }
      write_shared(shared + (row * 2 + e) * (32 * kI + kPad) + lane * kI, vector, true);
    }
    write_shared(shared + kColumnSums<kI, kJ> + r * kJ + row, column_sums[row / 2][row % 2 * 2], sum_columns && q == 0);
  }
  __syncthreads();
  float* const to = p.parts == 1 ? nullptr : p.partial + (part * gridDim.x + blockIdx.x) * kFloats;
  for (int index = threadIdx.x; index < kShareVectors<kJ>; index += blockDim.x) {
    add_shares<T, kI, kJ>(p, tile, index, shared_memory(), kFloats, shares, to);
  }
}

template <typename T, int kI, int kJ>
__global__ void __launch_bounds__(128) add_parts_kernel(const Problem p) {
  constexpr int64_t kFloats = kShareFloats<kI, kJ>;
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (index < kShareVectors<kJ>) {
    const float* const from = p.partial + blockIdx.x * kFloats;
    add_shares<T, kI, kJ>(p, tile_of(p, blockIdx.x), index, from, gridDim.x * kFloats, p.parts, nullptr);
  }
}

} // namespace
} // namespace blockdiag::cuda
