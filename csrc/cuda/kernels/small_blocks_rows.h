// Small blocks: activation times weight, with the bias.
#pragma once

#include "small_blocks_memory.h"

namespace blockdiag::cuda {
namespace {

// Activation times weight: C[j, i] = sum over l of X[j, l] W[i, l], row-major, for the rows j of the batch. W is the
// mma's A, and X its B: 16 columns of C for 8 rows of the batch. W is stored as A, and X as B: T, whose words are used
// as they were read, or float32, which is rounded to T.
//
// A warp has one block: its W in registers, and every `parts`-th tile of 8 rows of its X. The warps of a thread block
// share W through the L1 cache. Neighboring thread blocks have the same rows of neighboring blocks, which are adjacent
// in memory. No thread waits for another.

/// Neighbors of a row that a thread takes: its share of 16 elements, or of 32. As many as one instruction reads of X.
template <typename B, int kK>
constexpr int kPiece = kVector<B, (kK == 16 ? 4 : 8)>;

/// Thread q's share of a row: its pair i is element element_of<kPiece>(i, q) and the next.
template <int kPiece>
__device__ __forceinline__ int element_of(int i, int q) {
  return i * 2 / kPiece * kPiece * 4 + q * kPiece + i * 2 % kPiece;
}

template <typename E, int kK, int kPiece, bool kWide>
__device__ __forceinline__ Elements<E, kK / 4> load_row(const E* row, int q, int size, bool valid) {
  Elements<E, kK / 4> share;
  constexpr int kPieces = kK / 4 / kPiece, kWords = sizeof(share) / sizeof(uint32_t) / kPieces;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const auto piece = load<E, kPiece, kWide>(row, element_of<kPiece>(i * kPiece / 2, q), size, valid);
    for (int j = 0; j < kWords; ++j) {
      share.at[i * kWords + j] = piece.at[j];
    }
  }
  return share;
}

/// Thread r holds the kM / 8 rows of W from r * kM / 8 on, in pairs, as rows r and r + 8 of the mma's A.
template <int kM, int kK>
using Weight = uint32_t[kM / 16][kK / 16][4];

template <typename T, typename A, int kK, int kM, int kPiece, bool kWide>
__device__ __forceinline__ void load_weight(Weight<kM, kK>& w, const Problem& p, int64_t block, int r, int q) {
  const int m = static_cast<int>(p.gemm.m), k = static_cast<int>(p.gemm.k);
  const A* const a = static_cast<const A*>(p.a) + block * p.gemm.a.stride;
  if (p.gemm.a.transpose) { // rows of W are contiguous
#pragma unroll
    for (int i = 0; i < kM / 8; ++i) {
      const int row = r * kM / 8 + i;
      const auto share = load_row<A, kK, kPiece, kWide>(a + row * p.gemm.a.ld, q, k, row < m);
#pragma unroll
      for (int l = 0; l < kK / 8; ++l) {
        w[i / 2][l / 2][l % 2 * 2 + i % 2] = neighbors<T>(share, l);
      }
    }
  } else { // columns of W are contiguous
#pragma unroll
    for (int l = 0; l < kK / 8; ++l) {
      const int col = element_of<kPiece>(l, q);
      const auto first = load<A, kM / 8, kWide>(a + col * p.gemm.a.ld, r * kM / 8, m, col < k);
      const auto second = load<A, kM / 8, kWide>(a + (col + 1) * p.gemm.a.ld, r * kM / 8, m, col + 1 < k);
#pragma unroll
      for (int i = 0; i < kM / 8; ++i) {
        w[i / 2][l / 2][l % 2 * 2 + i % 2] = pair<T>(first, second, i);
      }
    }
  }
}

/// Loads N elements of the block's bias from `first` on, or zeros, as they are stored.
template <int N>
__device__ __forceinline__ void load_bias(uint32_t (&bits)[N], const Problem& p, int64_t block, int first) {
  const int64_t at = block * p.gemm.m + first;
  const int64_t count = p.bias == nullptr ? 0 : p.gemm.m - first;
  if (p.float32.bias) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      bits[i] = read<uint32_t>(static_cast<const uint32_t*>(p.bias) + at + i, i < count);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      bits[i] = read<uint16_t>(static_cast<const uint16_t*>(p.bias) + at + i, i < count);
    }
  }
}

constexpr int kRowWarps = 4; // per thread block, at most

/// Thread blocks per multiprocessor: bounds the registers. All of a W in float32 is to be in flight.
template <typename A, int kK, int kM>
constexpr int kRowBlocks = kK * kM * sizeof(A) > 8192 ? 2 : (kK * kM >= 2048 ? 3 : (kK * kM > 256 ? 4 : 6));

/// Tiles in flight per warp: 4 KiB, or 2 KiB in more warps.
template <typename B, int kK>
constexpr int kRowAhead = (kK == 64 ? 8 : 16) / sizeof(B);

template <typename T, typename A, typename B, int kK, int kM, bool kWide>
__global__ void __launch_bounds__(kRowWarps * 32, kRowBlocks<A, kK, kM>) row_kernel(const Problem p) {
  constexpr int kShare = kPiece<B, kK>;
  constexpr int kAhead = kRowAhead<B, kK> / (kWide || kK < 64 ? 1 : 2); // addresses of single elements take registers
  const int m = static_cast<int>(p.gemm.m), k = static_cast<int>(p.gemm.k);
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int64_t block = blockIdx.x, step = p.parts * 8;
  // Of the next tile to compute, and of the next one to read.
  int64_t first = (blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32) * 8, row = first + r;
  const B* b = static_cast<const B*>(p.b) + block * p.gemm.b.stride + row * p.gemm.b.ld;

  Elements<B, kK / 4> x[kAhead];
  const auto load_next = [&](Elements<B, kK / 4>& share) {
    share = load_row<B, kK, kShare, kWide>(b, q, k, row < p.gemm.n);
    row += step;
    b += step * p.gemm.b.ld;
  };
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    load_next(x[ahead]);
  }
  // Read before W, and converted after it: W's rounding waits for all that was read before.
  uint32_t bias_bits[kM / 8];
  load_bias(bias_bits, p, block, r * kM / 8);
  Weight<kM, kK> w;
  load_weight<T, A, kK, kM, kShare, kWide>(w, p, block, r, q);
  float bias[kM / 8];
#pragma unroll
  for (int i = 0; i < kM / 8; ++i) {
    bias[i] = p.float32.bias ? __builtin_bit_cast(float, bias_bits[i]) : to_float<T>(bias_bits[i]);
  }
  with_result<T>(p, p.c, [&](auto* c) {
    c += block * p.gemm.c.stride + (first + 2 * q) * p.gemm.c.ld;
    while (first < p.gemm.n) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead, first += step, c += step * p.gemm.c.ld) {
        if (first >= p.gemm.n) {
          return;
        }
        uint32_t words[kK / 8];
#pragma unroll
        for (int l = 0; l < kK / 8; ++l) {
          words[l] = neighbors<T>(x[ahead], l);
        }
        float values[2][kM / 8]; // of rows 2q and 2q + 1
#pragma unroll
        for (int i = 0; i < kM / 8; i += 2) {
          float sums[4] = {bias[i], bias[i], bias[i + 1], bias[i + 1]};
#pragma unroll
          for (int l = 0; l < kK / 16; ++l) {
            mma<T>(sums, w[i / 2][l], {words[2 * l], words[2 * l + 1]});
          }
          for (int e = 0; e < 4; ++e) {
            values[e % 2][i + e / 2] = sums[e];
          }
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          store(c + e * p.gemm.c.ld, r * kM / 8, m, values[e], p.wide_c, first + 2 * q + e < p.gemm.n);
        }
        load_next(x[ahead]);
      }
    }
  });
}

} // namespace
} // namespace blockdiag::cuda
