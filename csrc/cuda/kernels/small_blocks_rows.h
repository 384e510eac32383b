// Small blocks: activation times weight, with the bias.
#pragma once

#include "small_blocks_memory.h"

namespace blockdiag::cuda {
namespace {

// Activation times weight: C[j, i] = sum over l of X[j, l] W[i, l], row-major, for the rows j of the batch. W is the
// mma's A, and X its B: 16 columns of C for 8 rows of the batch. X's words are used as they were read.
//
// A warp has one block: its W in registers, and every `parts`-th tile of 8 rows of its X. The warps of a thread block
// share W through the L1 cache. Neighboring thread blocks have the same rows of neighboring blocks, which are adjacent
// in memory. No thread waits for another.

/// Words of a row that a thread reads at once: its share of 16 elements, or of 32.
template <int kK>
constexpr int kPiece = kK == 16 ? 2 : 4;

/// Thread q's share of a row: word i holds element element_of<kK>(i, q) and the next.
template <int kK>
__device__ __forceinline__ int element_of(int i, int q) {
  return i / kPiece<kK> * 32 + (q * kPiece<kK> + i % kPiece<kK>)*2;
}

template <int kK, bool kWide>
__device__ __forceinline__ void load_row(uint32_t (&words)[kK / 8], const uint16_t* row, int q, int size, bool valid) {
#pragma unroll
  for (int i = 0; i < kK / 8; i += kPiece<kK>) {
    const auto piece = load<kPiece<kK>, kWide>(row, element_of<kK>(i, q), size, valid);
    for (int j = 0; j < kPiece<kK>; ++j) {
      words[i + j] = piece.at[j];
    }
  }
}

/// Thread r holds the kM / 8 rows of W from r * kM / 8 on, in pairs, as rows r and r + 8 of the mma's A.
template <int kM, int kK>
using Weight = uint32_t[kM / 16][kK / 16][4];

template <int kK, int kM, bool kWide>
__device__ __forceinline__ void load_weight(Weight<kM, kK>& w, const Problem& p, int64_t block, int r, int q) {
  const int m = static_cast<int>(p.gemm.m), k = static_cast<int>(p.gemm.k);
  const uint16_t* const a = p.a + block * p.gemm.a.stride;
  if (p.gemm.a.transpose) { // rows of W are contiguous
#pragma unroll
    for (int i = 0; i < kM / 8; ++i) {
      uint32_t words[kK / 8];
      load_row<kK, kWide>(words, a + (r * kM / 8 + i) * p.gemm.a.ld, q, k, r * kM / 8 + i < m);
#pragma unroll
      for (int l = 0; l < kK / 8; ++l) {
        w[i / 2][l / 2][l % 2 * 2 + i % 2] = words[l];
      }
    }
  } else { // columns of W are contiguous
#pragma unroll
    for (int l = 0; l < kK / 8; ++l) {
      const int col = element_of<kK>(l, q);
      const auto first = load<kM / 16, kWide>(a + col * p.gemm.a.ld, r * kM / 8, m, col < k);
      const auto second = load<kM / 16, kWide>(a + (col + 1) * p.gemm.a.ld, r * kM / 8, m, col + 1 < k);
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) {
        w[i / 2][l / 2][l % 2 * 2 + i % 2] = pair(first, second, i);
      }
    }
  }
}

constexpr int kRowWarps = 4; // per thread block, at most

/// Thread blocks per multiprocessor: bounds the registers.
template <int kK, int kM>
constexpr int kRowBlocks = kK * kM >= 2048 ? 3 : (kK * kM > 256 ? 4 : 6);

/// Tiles in flight per warp: 4 KiB, or 2 KiB in more warps.
template <int kK>
constexpr int kRowAhead = kK == 64 ? 4 : 8;

template <typename T, int kK, int kM, bool kWide>
__global__ void __launch_bounds__(kRowWarps * 32, kRowBlocks<kK, kM>) row_kernel(const Problem p) {
  constexpr int kAhead = kRowAhead<kK>;
  const int m = static_cast<int>(p.gemm.m), k = static_cast<int>(p.gemm.k);
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int64_t block = blockIdx.x, step = p.parts * 8;
  // Of the next tile to compute, and of the next one to read.
  int64_t first = (blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * 8, row = first + r;
  uint16_t* c = p.c + block * p.gemm.c.stride + (first + 2 * q) * p.gemm.c.ld;
  const uint16_t* b = p.b + block * p.gemm.b.stride + row * p.gemm.b.ld;

  uint32_t x[kAhead][kK / 8];
  const auto load_next = [&](uint32_t (&words)[kK / 8]) {
    load_row<kK, kWide>(words, b, q, k, row < p.gemm.n);
    row += step;
    b += step * p.gemm.b.ld;
  };
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    load_next(x[ahead]);
  }
  Weight<kM, kK> w;
  load_weight<kK, kM, kWide>(w, p, block, r, q);
  float bias[kM / 8];
#pragma unroll
  for (int i = 0; i < kM / 8; ++i) {
    const bool valid = p.bias != nullptr && r * kM / 8 + i < m;
    bias[i] = to_float<T>(read<uint16_t>(p.bias + block * m + r * kM / 8 + i, valid));
  }

  while (first < p.gemm.n) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead, first += step, c += step * p.gemm.c.ld) {
      if (first >= p.gemm.n) {
        return;
      }
      float values[2][kM / 8]; // of rows 2q and 2q + 1
#pragma unroll
      for (int i = 0; i < kM / 8; i += 2) {
        float sums[4] = {bias[i], bias[i], bias[i + 1], bias[i + 1]};
#pragma unroll
        for (int l = 0; l < kK / 16; ++l) {
          mma<T>(sums, w[i / 2][l], {x[ahead][2 * l], x[ahead][2 * l + 1]});
        }
        for (int e = 0; e < 4; ++e) {
          values[e % 2][i + e / 2] = sums[e];
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        store<T>(c + e * p.gemm.c.ld, r * kM / 8, m, values[e], p.wide_c, first + 2 * q + e < p.gemm.n);
      }
      load_next(x[ahead]);
    }
  }
}

} // namespace
} // namespace blockdiag::cuda
