// Loads and stores of the kernels for small blocks.
#pragma once

#include "problem/gemm.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#ifdef __CUDACC__
#include "device.h"
#else
#include "emulated_cuda.h" // from tests/cpp, which runs these files on a CPU
#endif

#include <type_traits>

namespace blockdiag::cuda {
namespace {

// Aligned to its size, so that one instruction moves it.
template <typename E, int N>
struct alignas(sizeof(E) * N) Vector {
  E at[N];
};

/// The arguments of a kernel.
struct Problem {
  Gemm gemm;
  const uint16_t *a, *b, *bias;
  uint16_t *c, *bias_grad;
  float* partial;            // sums of the batch's parts, if there are several
  int64_t parts;             // of the batch, computed in parallel
  bool wide_c;               // whether vectors of C are aligned
  unsigned tiles_i, tiles_j; // of 32 columns, and of 32 rows, of C in a sum over the batch: 1 or 2
};

/// Loads 2N elements of a row of `size` from `col` on, as vectors if kWide: aligned, and ending where the row ends.
template <int N, bool kWide>
__device__ __forceinline__ Vector<uint32_t, N> load(const uint16_t* row, int col, int size, bool valid) {
  if constexpr (kWide) {
    return read<Vector<uint32_t, N>>(row + col, valid && col < size);
  } else {
    Vector<uint32_t, N> words;
#pragma unroll
    for (int i = 0; i < N; ++i, col += 2) {
      const uint32_t low = read<uint16_t>(row + col, valid && col < size);
      words.at[i] = low | uint32_t{read<uint16_t>(row + col + 1, valid && col + 1 < size)} << 16;
    }
    return words;
  }
}

/// Rounds and stores N elements of a row of `size`, starting at `col`.
template <typename T, int N>
__device__ __forceinline__ void store(
    uint16_t* row, int col, int size, const float (&values)[N], bool wide, bool valid
) {
  Vector<uint32_t, N / 2> words;
  for (int i = 0; i < N / 2; ++i) {
    words.at[i] = T(values[2 * i]).x | uint32_t{T(values[2 * i + 1]).x} << 16;
  }
  if (wide) {
    write(row + col, words, valid && col < size);
  } else {
    for (int i = 0; i < N; ++i) {
      write(row + col + i, static_cast<uint16_t>(words.at[i / 2] >> i % 2 * 16), valid && col + i < size);
    }
  }
}

/// Element `i` of two rows as a pair, from words that hold neighbors in a row.
template <int N>
__device__ __forceinline__ uint32_t pair(const Vector<uint32_t, N>& first, const Vector<uint32_t, N>& second, int i) {
  return __byte_perm(first.at[i / 2], second.at[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
}

template <typename T>
__device__ __forceinline__ float to_float(uint32_t bits) {
  return static_cast<float>(T(static_cast<uint16_t>(bits), T::from_bits()));
}

} // namespace
} // namespace blockdiag::cuda
