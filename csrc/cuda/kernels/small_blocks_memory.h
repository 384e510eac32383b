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

#include <algorithm>
#include <type_traits>

namespace blockdiag::cuda {
namespace {

// Aligned to its size, so that one instruction moves it.
template <typename E, int N>
struct alignas(sizeof(E) * N) Vector {
  E at[N];
};

/// N neighbors in a row of E, as they are read: floats, or pairs of a half type.
template <typename E, int N>
using Elements = std::conditional_t<std::is_same_v<E, float>, Vector<float, N>, Vector<uint32_t, N / 2>>;

/// How many of N neighbors in a row are read or written by one instruction, if they are aligned.
template <typename E, int N>
constexpr int kVector = std::min<int>(N, 16 / sizeof(E));

/// The arguments of a kernel.
struct Problem {
  Gemm gemm;
  Float32 float32;
  const void *a, *b, *bias;
  void *c, *bias_grad;
  float* partial;            // sums of the batch's parts, if there are several
  int64_t parts;             // of the batch, computed in parallel
  bool wide_c;               // whether vectors of C are aligned
  unsigned tiles_i, tiles_j; // of 32 columns, and of 32 rows, of C in a sum over the batch: 1 or 2
};

/// Loads N elements of a row of `size` from `col` on, as vectors if kWide: aligned, and ending where the row ends.
template <typename E, int N, bool kWide>
__device__ __forceinline__ Elements<E, N> load(const E* row, int col, int size, bool valid) {
  constexpr int kStep = kVector<E, N>;
  using Piece = Elements<E, kStep>;
  if constexpr (kWide && kStep == N) {
    return read<Piece>(row + col, valid && col < size);
  } else {
    Elements<E, N> elements;
    if constexpr (kWide) {
#pragma unroll
      for (int i = 0; i < N; i += kStep) {
        const auto piece = read<Piece>(row + col + i, valid && col + i < size);
        for (int j = 0; j < kStep; ++j) {
          elements.at[i + j] = piece.at[j];
        }
      }
    } else if constexpr (std::is_same_v<E, float>) {
#pragma unroll
      for (int i = 0; i < N; ++i, ++col) {
        elements.at[i] = read<float>(row + col, valid && col < size);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N / 2; ++i, col += 2) {
        const uint32_t low = read<uint16_t>(row + col, valid && col < size);
        elements.at[i] = low | uint32_t{read<uint16_t>(row + col + 1, valid && col + 1 < size)} << 16;
      }
    }
    return elements;
  }
}

/// Elements 2i and 2i + 1 of a row, in T.
template <typename T, int N>
__device__ __forceinline__ uint32_t neighbors(const Vector<uint32_t, N>& row, int i) {
  return row.at[i];
}

template <typename T, int N>
__device__ __forceinline__ uint32_t neighbors(const Vector<float, N>& row, int i) {
  return round_pair<T>(row.at[2 * i], row.at[2 * i + 1]);
}

/// Element `i` of two rows as a pair, in T.
template <typename T, int N>
__device__ __forceinline__ uint32_t pair(const Vector<uint32_t, N>& first, const Vector<uint32_t, N>& second, int i) {
  return __byte_perm(first.at[i / 2], second.at[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
}

template <typename T, int N>
__device__ __forceinline__ uint32_t pair(const Vector<float, N>& first, const Vector<float, N>& second, int i) {
  return round_pair<T>(first.at[i], second.at[i]);
}

/// Stores N elements of a row of `size`, starting at `col`, rounded if E is a half type.
template <typename E, int N>
__device__ __forceinline__ void store(E* row, int col, int size, const float (&values)[N], bool wide, bool valid) {
  if (wide) {
    constexpr int kStep = kVector<E, N>;
    for (int i = 0; i < N; i += kStep) {
      Elements<E, kStep> piece;
      if constexpr (std::is_same_v<E, float>) {
        for (int j = 0; j < kStep; ++j) {
          piece.at[j] = values[i + j];
        }
      } else {
        for (int j = 0; j < kStep / 2; ++j) {
          piece.at[j] = round_pair<E>(values[i + 2 * j], values[i + 2 * j + 1]);
        }
      }
      write(row + col + i, piece, valid && col + i < size);
    }
  } else {
    for (int i = 0; i < N; ++i) {
      write(row + col + i, E(values[i]), valid && col + i < size);
    }
  }
}

/// Calls `function` with C, or the bias's gradient, as what it is stored in: T or float32.
template <typename T, typename Function>
__device__ __forceinline__ void with_result(const Problem& p, void* result, const Function& function) {
  p.float32.c ? function(static_cast<float*>(result)) : function(static_cast<T*>(result));
}

template <typename T>
__device__ __forceinline__ float to_float(uint32_t bits) {
  return static_cast<float>(T(static_cast<uint16_t>(bits), T::from_bits()));
}

} // namespace
} // namespace blockdiag::cuda
