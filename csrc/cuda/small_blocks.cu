// Small blocks on tensor cores: both kernels are bound by memory, so all that matters is how data moves.
//
// Nothing passes through shared memory on its way to the tensor cores: operands go from global memory to the registers of
// the threads that multiply them, and back, in vectors of up to 16 bytes. That takes a permutation. In mma.m16n8k16 thread
// (r, q) = (lane / 4, lane % 4) holds the elements 2q, 2q + 1, 2q + 8 and 2q + 9 of rows r and r + 8 of A and of column r of
// B, and of the result rows r and r + 8 in columns 2q and 2q + 1 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating
// point type"). A sum does not depend on the order of its terms, nor a row of a product on those beside it: so thread q takes
// eight neighbours in memory for its share of two mma's, as long as both operands do, and rows are dealt out to mma's such
// that a thread's results are neighbours too.
//
// Pairs of elements share a register, the first in its lower half. Elements outside of a matrix are zeros, never read.
#include "small_blocks.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#ifdef __CUDACC__
#include "device.h"
#else
#include "emulated_cuda.h" // of tests/cpp, which runs this file on a CPU
#endif

#include <algorithm>
#include <limits>
#include <type_traits>

namespace blockdiag::cuda {
namespace {

// Aligned to its size, so that it is read and written at once.
template <typename E, int N>
struct alignas(sizeof(E) * N) Vector {
  E at[N];
};

struct Problem {
  Gemm gemm;
  const uint16_t *a, *b, *bias;
  uint16_t *c, *bias_grad;
  float* partial;     // sums of parts of the batch, if there are several
  int64_t parts;      // of the batch, which are computed at the same time
  bool wide_c;        // whether vectors of C are aligned
  int more_i, more_j; // whether C has two tiles of 32 columns, or rows, in a sum over the batch: 0 or 1
};

/// 2N elements of a row of `size` from `col` on. Vectors only if kWide: they are aligned, and end where the row ends.
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

/// Rounds and stores N elements of a row of `size` from `col` on.
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

/// Element `i` of two rows as a pair, from the words that have the rows' elements side by side.
template <int N>
__device__ __forceinline__ uint32_t pair(const Vector<uint32_t, N>& first, const Vector<uint32_t, N>& second, int i) {
  return __byte_perm(first.at[i / 2], second.at[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
}

template <typename T>
__device__ __forceinline__ float to_float(uint32_t bits) {
  return static_cast<float>(T(static_cast<uint16_t>(bits), T::from_bits()));
}

// Activation times weight: C[j, i] = sum over l of X[j, l] W[i, l], row-major, for the rows j of the batch. W is the mma's A,
// and X its B: 16 columns of C for 8 rows of the batch, which X's words feed as they were read.
//
// A warp has one block: its W in registers, and every `parts`-th tile of 8 rows of its X. The warps of a thread block share
// W, by way of the first cache; neighbouring thread blocks have the same rows of neighbouring blocks, which lie side by side.
// No thread waits for another.

/// How many words of a row of K elements a thread reads at once: all of 16, or of each 32.
template <int kK>
constexpr int kPiece = kK == 16 ? 2 : 4;

/// Thread q's share of a row: word i is of the elements element_of<kK>(i, q) and the next.
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

/// Thread r has the kM / 8 rows of W from r * kM / 8 on, in pairs, as rows r and r + 8 of the mma's A.
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
  } else { // columns are
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

constexpr int kRowWarps = 4; // of a thread block, at most

/// Thread blocks on a multiprocessor: bounds the registers.
template <int kK, int kM>
constexpr int kRowBlocks = kK * kM >= 2048 ? 3 : (kK * kM > 256 ? 4 : 6);

/// How many tiles are on their way to a warp: 4 KiB, or 2 in more warps.
template <int kK>
constexpr int kRowAhead = kK == 64 ? 4 : 8;

template <typename T, int kK, int kM, bool kWide>
__global__ void __launch_bounds__(kRowWarps * 32, kRowBlocks<kK, kM>) row_kernel(const Problem p) {
  constexpr int kAhead = kRowAhead<kK>;
  const int m = static_cast<int>(p.gemm.m), k = static_cast<int>(p.gemm.k);
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const int64_t block = blockIdx.x, step = p.parts * 8;
  // Of the tile that is computed next, and of the one that is read next.
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

// A sum over the batch: C[j, i] = sum over l of Y[l, j] X[l, i], row-major. Y's columns are the rows of the mma's A, X's the
// columns of its B, and l is what the mma sums over: pairs of rows of the batch share a register, so two rows that a thread
// read are interleaved. Thread r has kJ and kI neighbouring columns, and an mma one (of X) or two (of Y) of each thread's.
//
// A thread block has one block of the weight, and every `parts`-th of the tiles of 16 rows. Its warps share the rows out, and
// the 32 x 32 tiles of C if there are several. The warps' sums are added up in order in shared memory, and those of several
// thread blocks in order by a second kernel: no atomics, so equal calls give equal bits.

constexpr int kSumWarps = 8; // of a thread block, at most

/// How many tiles are on their way to a warp.
template <int kI, int kJ>
constexpr int kSumAhead = 16 / (kI + kJ);

// One share's sums: for each tile of C, for each of the kJ rows and both halves of the 2 kI columns of a thread a vector of kI
// from each thread, and after all tiles the sums of Y's columns.
constexpr int kPad = 16; // floats: two halves, which are read at the same time, lie in different banks

template <int kI, int kJ>
constexpr int kTileFloats = kJ * 2 * (32 * kI + kPad);

template <int kI, int kJ>
__host__ __device__ int share_floats(const Problem& p) {
  return (kTileFloats<kI, kJ> << (p.more_i + p.more_j)) + (32 << p.more_j);
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

/// Adds up one vector of `count` shares, which stand one after another in steps of `step` floats, in order, into one at `to`;
/// or into the results, if that is null. Vectors with neighbouring indices are neighbours in C.
template <typename T, int kI, int kJ>
__device__ void add_shares(
    const Problem& p, int64_t block, int index, const float* from, int64_t step, int64_t count, float* to
) {
  const int tile = index / (kJ * 64), row = index / 64 % kJ, lane = index / 2 % 32, e = index % 2;
  if (const int vectors = kJ * 64 << (p.more_i + p.more_j); index < vectors) {
    const int at = tile * kTileFloats<kI, kJ> + (row * 2 + e) * (32 * kI + kPad) + lane * kI;
    const auto total = add_vectors<kI>(from + at, step, count);
    if (to != nullptr) {
      write(to + at, total, true);
      return;
    }
    const int i = (tile & p.more_i) * 32 + kI * (2 * (lane % 4) + e),
              j = (tile >> p.more_i) * 32 + kJ * (lane / 4) + row;
    uint16_t* const c = p.c + block * p.gemm.c.stride + j * p.gemm.c.ld;
    store<T>(c, i, static_cast<int>(p.gemm.m), total.at, p.wide_c, j < p.gemm.n);
  } else if (const int j = index - vectors; p.bias_grad != nullptr && j < p.gemm.n) {
    const int at = (kTileFloats<kI, kJ> << (p.more_i + p.more_j)) + j;
    const auto total = add_vectors<1>(from + at, step, count);
    if (to != nullptr) {
      write(to + at, total, true);
    } else {
      write(p.bias_grad + block * p.gemm.n + j, T(total.at[0]).x, true);
    }
  }
}

/// How many indices add_shares has.
template <int kJ>
__host__ __device__ int share_vectors(const Problem& p) {
  return (kJ * 64 << (p.more_i + p.more_j)) + (32 << p.more_j);
}

template <typename T, int kI, int kJ, bool kWide>
__global__ void __launch_bounds__(kSumWarps * 32, 2) sum_kernel(const Problem p) {
  constexpr int kAhead = kSumAhead<kI, kJ>;
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int output_tiles = 1 << (p.more_i + p.more_j), shares = blockDim.x / 32 >> (p.more_i + p.more_j);
  const int share = warp >> (p.more_i + p.more_j), tile_i = warp & p.more_i, tile_j = warp >> p.more_i & p.more_j;
  const int m = static_cast<int>(p.gemm.m), n = static_cast<int>(p.gemm.n);
  const int64_t block = blockIdx.x, part = blockIdx.y, step = p.parts * shares * 16;
  // Of the tile that is summed next, and of the one that is read next.
  int64_t first = (part * shares + share) * 16, row = first + q;
  const uint16_t* a = p.a + block * p.gemm.a.stride + row * p.gemm.a.ld;
  const uint16_t* b = p.b + block * p.gemm.b.stride + row * p.gemm.b.ld;

  Vector<uint32_t, kI / 2> x[kAhead][4];
  Vector<uint32_t, kJ / 2> y[kAhead][4];
  const auto load_next = [&](int ahead) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool valid = row + 4 * i < p.gemm.k;
      x[ahead][i] = load<kI / 2, kWide>(a + 4 * i * p.gemm.a.ld, tile_i * 32 + r * kI, m, valid);
      y[ahead][i] = load<kJ / 2, kWide>(b + 4 * i * p.gemm.b.ld, tile_j * 32 + r * kJ, n, valid);
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
  const bool sum_columns = p.bias_grad != nullptr && tile_i == 0;
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
            pair(ry[0], ry[1], u), pair(ry[0], ry[1], u + 1), pair(ry[2], ry[3], u), pair(ry[2], ry[3], u + 1)
        };
#pragma unroll
        for (int t = 0; t < kI; ++t) {
          mma<T>(sums[u / 2][t], left, {pair(rx[0], rx[1], t), pair(rx[2], rx[3], t)});
        }
        if (sum_columns) {
          mma<T>(column_sums[u / 2], left, {kOnes, kOnes}); // each of its columns is the sum
        }
      }
      load_next(ahead);
    }
  }

  const int floats = share_floats<kI, kJ>(p);
  float* const shared = shared_memory() + share * floats;
#pragma unroll
  for (int row = 0; row < kJ; ++row) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      Vector<float, kI> vector;
      for (int t = 0; t < kI; ++t) {
        vector.at[t] = sums[row / 2][t][row % 2 * 2 + e];
      }
      const int tile = (warp & (output_tiles - 1)) * kTileFloats<kI, kJ>;
      write_shared(shared + tile + (row * 2 + e) * (32 * kI + kPad) + lane * kI, vector, true);
    }
    float* const columns = shared + output_tiles * kTileFloats<kI, kJ> + tile_j * 32;
    write_shared(columns + r * kJ + row, column_sums[row / 2][row % 2 * 2], sum_columns && q == 0);
  }
  __syncthreads();
  float* const to = p.parts == 1 ? nullptr : p.partial + (part * p.gemm.batch + block) * floats;
  for (int index = threadIdx.x; index < share_vectors<kJ>(p); index += blockDim.x) {
    add_shares<T, kI, kJ>(p, block, index, shared_memory(), floats, shares, to);
  }
}

template <typename T, int kI, int kJ>
__global__ void __launch_bounds__(128) add_parts_kernel(const Problem p) {
  const int floats = share_floats<kI, kJ>(p);
  const int64_t block = blockIdx.x;
  const int index = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (index < share_vectors<kJ>(p)) {
    add_shares<T, kI, kJ>(p, block, index, p.partial + block * floats, p.gemm.batch * floats, p.parts, nullptr);
  }
}

constexpr int64_t kMaxSize = 64;
constexpr int64_t kMaxBatch = std::numeric_limits<int32_t>::max(); // thread blocks of a grid
// To be measured: from how many rows on a batch is split, as its sum is then worth a second kernel; and rows of a part.
constexpr int64_t kSplitRows = 1024, kPartRows = 256;

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/// Whether vectors of `elements`, which start at multiples of it in rows of `size`, are aligned and end where rows end.
bool is_wide(const void* pointer, const Operand& operand, int64_t batch, int64_t size, int64_t elements) {
  const auto offsets = reinterpret_cast<uintptr_t>(pointer) / 2 | static_cast<uint64_t>(size | operand.ld) |
                       static_cast<uint64_t>(batch > 1 ? operand.stride : 0);
  return reinterpret_cast<uintptr_t>(pointer) % 2 == 0 && offsets % elements == 0;
}

/// Calls `function` with the constant 16, 32 or 64 that `size` fits in.
template <typename Function>
void with_width(int64_t size, const Function& function) {
  if (size <= 16) {
    function(std::integral_constant<int, 16>());
  } else if (size <= 32) {
    function(std::integral_constant<int, 32>());
  } else {
    function(std::integral_constant<int, 64>());
  }
}

template <typename T, int kK, int kM, bool kWide>
void run_rows(Problem p, int64_t processors) {
  p.wide_c = is_wide(p.c, p.gemm.c, p.gemm.batch, p.gemm.m, kM / 8);
  // As many warps as have room at once; but rather tiles enough for each to be worth its W, if that leaves 4 warps for each
  // multiprocessor.
  const int64_t tiles = divide_up(p.gemm.n, 8), batch = p.gemm.batch;
  const int64_t most = processors * kRowBlocks<kK, kM> * kRowWarps / batch;
  const int64_t enough = std::max(divide_up(tiles, kRowAhead<kK>), 4 * processors / batch);
  p.parts = std::clamp<int64_t>(std::min(most, enough), 1, tiles);
  p.parts = divide_up(tiles, divide_up(tiles, p.parts)); // the same number of tiles for all
  const int64_t warps = std::min({divide_up(p.parts * batch, processors), p.parts, int64_t{kRowWarps}});
  p.parts = divide_up(p.parts, warps) * warps;
  launch(row_kernel<T, kK, kM, kWide>, batch, p.parts / warps, warps * 32, 0, p);
}

template <typename T, int kI, int kJ, bool kWide>
void run_sum(Problem p, int64_t processors) {
  p.wide_c = is_wide(p.c, p.gemm.c, p.gemm.batch, p.gemm.m, kI);
  p.more_i = p.gemm.m > 32;
  p.more_j = p.gemm.n > 32;
  if (p.parts = 1; p.gemm.k >= kSplitRows) {
    p.parts = std::clamp<int64_t>(2 * processors / p.gemm.batch, 1, p.gemm.k / kPartRows);
  }
  const int64_t tiles = divide_up(p.gemm.k, 16 * p.parts);
  const int64_t shares =
      std::clamp<int64_t>(divide_up(tiles, kSumAhead<kI, kJ>), 1, kSumWarps >> (p.more_i + p.more_j));
  c10::DataPtr partial; // of the caching allocator, which knows of streams and of graph capture
  if (p.parts > 1) {
    const auto floats = p.parts * p.gemm.batch * share_floats<kI, kJ>(p);
    partial = c10::cuda::CUDACachingAllocator::get()->allocate(floats * sizeof(float));
    p.partial = static_cast<float*>(partial.get());
  }
  const size_t shared_bytes = shares * share_floats<kI, kJ>(p) * sizeof(float);
  launch(sum_kernel<T, kI, kJ, kWide>, p.gemm.batch, p.parts, (shares << (p.more_i + p.more_j)) * 32, shared_bytes, p);
  if (p.parts > 1) {
    launch(add_parts_kernel<T, kI, kJ>, p.gemm.batch, divide_up(share_vectors<kJ>(p), 128), 128, 0, p);
  }
}

template <typename T>
bool run(const Problem& p, int64_t processors) {
  const auto& [m, n, k, batch, a, b, c] = p.gemm;
  if (!b.transpose && m <= kMaxSize && k <= kMaxSize && p.bias_grad == nullptr) {
    with_width(k, [&](auto width_k) {
      with_width(m, [&](auto width_m) {
        constexpr int kK = width_k, kM = width_m, kSquare = std::max(kK, kM);
        const int64_t of_a = a.transpose ? kPiece<kK> * 2 : kM / 8;
        if (is_wide(p.b, b, batch, k, kPiece<kK> * 2) && is_wide(p.a, a, batch, a.transpose ? k : m, of_a)) {
          run_rows<T, kK, kM, true>(p, processors);
        } else {
          run_rows<T, kSquare, kSquare, false>(p, processors);
        }
      });
    });
    return true;
  }
  if (!a.transpose && b.transpose && m <= kMaxSize && n <= kMaxSize && p.bias == nullptr) {
    with_width(std::min<int64_t>(m, 32), [&](auto width_m) {
      with_width(std::min<int64_t>(n, 32), [&](auto width_n) {
        constexpr int kI = std::min<int>(width_m, 32) / 8, kJ = std::min<int>(width_n, 32) / 8;
        if (is_wide(p.a, a, batch, m, kI) && is_wide(p.b, b, batch, n, kJ)) {
          run_sum<T, kI, kJ, true>(p, processors);
        } else {
          run_sum<T, 4, 4, false>(p, processors);
        }
      });
    });
    return true;
  }
  return false;
}

} // namespace

bool run_small_blocks(
    const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c, void* bias_grad
) {
  const auto& device = *at::cuda::getCurrentDeviceProperties();
  if (device.major < 8 || gemm.batch > kMaxBatch || gemm.c.transpose) {
    return false;
  }
  Problem p{};
  p.gemm = gemm;
  p.a = static_cast<const uint16_t*>(a);
  p.b = static_cast<const uint16_t*>(b);
  p.bias = static_cast<const uint16_t*>(bias);
  p.c = static_cast<uint16_t*>(c);
  p.bias_grad = static_cast<uint16_t*>(bias_grad);
  switch (dtype) {
    case c10::kHalf:
      return run<c10::Half>(p, device.multiProcessorCount);
    case c10::kBFloat16:
      return run<c10::BFloat16>(p, device.multiProcessorCount);
    default:
      return false;
  }
}

} // namespace blockdiag::cuda
