// Small blocks on tensor cores: both kernels are bound by memory, so all that matters is how data moves.
//
// Nothing passes through shared memory on its way to the tensor cores: operands go from global memory to the registers of
// the threads that multiply them, and back, in vectors of up to 16 bytes. That takes a permutation. In mma.m16n8k16 thread
// (r, q) = (lane / 4, lane % 4) holds the elements 2q, 2q + 1, 2q + 8 and 2q + 9 of row r (and of row r + 8) of A, those of
// column r of B, and columns 2q and 2q + 1 of the result (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point
// type"). A sum does not depend on the order of its terms, nor a product's column on those beside it: so thread q takes
// eight neighbours in memory for its share of two mma's, as long as both operands do, and columns are dealt out to mma's
// such that its results are neighbours too.
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
  float* partial;       // sums of parts of the batch, if there are several
  int64_t parts;        // of the batch, which are computed at the same time
  bool wide_c;          // whether vectors of C are aligned
  int tiles_i, tiles_j; // tiles of 32 columns that C has in a sum over the batch
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
  Vector<uint16_t, N> rounded;
  for (int i = 0; i < N; ++i) {
    rounded.at[i] = T(values[i]).x;
  }
  if (wide) {
    write(row + col, rounded, valid && col < size);
  } else {
    for (int i = 0; i < N; ++i) {
      write(row + col + i, rounded.at[i], valid && col + i < size);
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

// Activation times weight: C[j, i] = sum over l of X[j, l] W[i, l], row-major, for the rows j of the batch. X is the mma's A,
// and W its B.
//
// A warp has one block: its W in registers, and every `parts`-th tile of 16 rows of its X. The warps of a thread block share
// W, by way of the first cache; neighbouring thread blocks have the same rows of neighbouring blocks, which lie side by side.
// No thread waits for another.

/// How many words of a row of kWidth elements a thread reads at once, and how many neighbouring columns each of the mma's 8
/// columns stands for, in as many mma's: all there are of 16, or of each 32.
template <int kWidth>
constexpr int kRun = kWidth == 16 ? 2 : 4;

/// Thread q's share of a row: word i is of the elements element_of<kK>(i, q) and the next.
template <int kK>
__device__ __forceinline__ int element_of(int i, int q) {
  return i / kRun<kK> * 32 + (q * kRun<kK> + i % kRun<kK>)*2;
}

template <int kK, bool kWide>
__device__ __forceinline__ void load_row(uint32_t (&words)[kK / 8], const uint16_t* row, int q, int size, bool valid) {
#pragma unroll
  for (int i = 0; i < kK / 8; i += kRun<kK>) {
    const auto piece = load<kRun<kK>, kWide>(row, element_of<kK>(i, q), size, valid);
    for (int j = 0; j < kRun<kK>; ++j) {
      words[i + j] = piece.at[j];
    }
  }
}

/// Column r of mma t is row i = t / run * 32 + r * run + t % run of W: at a + i * ld, or at a + i with steps of ld.
template <int kK, int kM, bool kWide>
__device__ __forceinline__ void load_weight(
    uint32_t (&w)[kM / 8][kK / 8], const Problem& p, int64_t block, int r, int q
) {
  constexpr int run = kRun<kM>;
  const int m = static_cast<int>(p.gemm.m), k = static_cast<int>(p.gemm.k);
  const uint16_t* const a = p.a + block * p.gemm.a.stride;
#pragma unroll
  for (int t = 0; t < kM / 8; ++t) {
    const int row = t / run * 32 + r * run + t % run;
    if (p.gemm.a.transpose) {
      load_row<kK, kWide>(w[t], a + row * p.gemm.a.ld, q, k, row < m);
    } else if (t % run == 0) {
#pragma unroll
      for (int i = 0; i < kK / 8; ++i) {
        const int l = element_of<kK>(i, q);
        const auto first = load<run / 2, kWide>(a + l * p.gemm.a.ld, row, m, l < k);
        const auto second = load<run / 2, kWide>(a + (l + 1) * p.gemm.a.ld, row, m, l + 1 < k);
        for (int u = 0; u < run; ++u) {
          w[t + u][i] = pair(first, second, u);
        }
      }
    }
  }
}

constexpr int kRowWarps = 4; // of a thread block, at most

/// Thread blocks on a multiprocessor: bounds the registers.
constexpr int row_blocks(int k, int m) {
  return k * m >= 2048 ? 3 : 4;
}

/// How many tiles are on their way to a warp: 4 KiB.
constexpr int row_ahead(int k) {
  return 128 / k;
}

template <typename T, int kK, int kM, bool kWide>
__global__ void __launch_bounds__(kRowWarps * 32, row_blocks(kK, kM)) row_kernel(const Problem p) {
  constexpr int run = kRun<kM>, kAhead = row_ahead(kK);
  const int m = static_cast<int>(p.gemm.m), k = static_cast<int>(p.gemm.k);
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
  const auto batch = static_cast<unsigned>(p.gemm.batch);
  const int64_t block = blockIdx.x % batch, tiles = (p.gemm.n + 15) / 16;
  int64_t tile = blockIdx.x / batch * (blockDim.x / 32) + threadIdx.x / 32;

  uint32_t x[kAhead][2][kK / 8]; // of rows r and r + 8
  const auto load_tile = [&](uint32_t (&rows)[2][kK / 8], int64_t tile) {
    for (int half = 0; half < 2; ++half) {
      const int64_t j = tile * 16 + half * 8 + r;
      load_row<kK, kWide>(rows[half], p.b + block * p.gemm.b.stride + j * p.gemm.b.ld, q, k, j < p.gemm.n);
    }
  };
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    load_tile(x[ahead], tile + ahead * p.parts);
  }
  uint32_t w[kM / 8][kK / 8];
  load_weight<kK, kM, kWide>(w, p, block, r, q);
  // Thread q's results of mma's t to t + run are 2 * run neighbours: from mma t + u the elements u and run + u.
  uint32_t bias[kM / 8];
#pragma unroll
  for (int t = 0; t < kM / 8; ++t) {
    const int i = t / run * 32 + 2 * q * run + t % run;
    const auto element = [&](int i) {
      return uint32_t{read<uint16_t>(p.bias + block * m + i, p.bias != nullptr && i < m)};
    };
    bias[t] = element(i) | element(i + run) << 16;
  }

  while (tile < tiles) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead, tile += p.parts) {
      if (tile >= tiles) {
        return;
      }
#pragma unroll
      for (int t = 0; t < kM / 8; t += run) {
        float values[2][2 * run]; // of rows r and r + 8
#pragma unroll
        for (int u = 0; u < run; ++u) {
          const float low = to_float<T>(bias[t + u]), high = to_float<T>(bias[t + u] >> 16);
          float sums[4] = {low, high, low, high};
#pragma unroll
          for (int i = 0; i < kK / 8; i += 2) {
            const auto& [top, bottom] = x[ahead];
            mma<T>(sums, {top[i], bottom[i], top[i + 1], bottom[i + 1]}, {w[t + u][i], w[t + u][i + 1]});
          }
          for (int e = 0; e < 4; ++e) {
            values[e / 2][e % 2 * run + u] = sums[e];
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t j = tile * 16 + half * 8 + r;
          uint16_t* const c = p.c + block * p.gemm.c.stride + j * p.gemm.c.ld;
          store<T>(c, t / run * 32 + 2 * run * q, m, values[half], p.wide_c, j < p.gemm.n);
        }
      }
      load_tile(x[ahead], tile + kAhead * p.parts);
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
constexpr int sum_ahead(int i, int j) {
  return 16 / (i + j);
}

// One share's sums: for each tile of C, for each of the kJ rows and both halves of the 2 kI columns of a thread a vector of kI
// from each thread, and after all tiles the sums of Y's columns.
constexpr int kPad = 16; // floats: two halves, which are read at the same time, lie in different banks

template <int kI, int kJ>
constexpr int kTileFloats = kJ * 2 * (32 * kI + kPad);

template <int kI, int kJ>
__host__ __device__ int share_floats(const Problem& p) {
  return p.tiles_i * p.tiles_j * kTileFloats<kI, kJ> + p.tiles_j * 32;
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
  if (const int vectors = p.tiles_i * p.tiles_j * kJ * 64; index < vectors) {
    const int at = tile * kTileFloats<kI, kJ> + (row * 2 + e) * (32 * kI + kPad) + lane * kI;
    const auto total = add_vectors<kI>(from + at, step, count);
    if (to != nullptr) {
      write(to + at, total, true);
      return;
    }
    const int i = tile % p.tiles_i * 32 + kI * (2 * (lane % 4) + e), j = tile / p.tiles_i * 32 + kJ * (lane / 4) + row;
    uint16_t* const c = p.c + block * p.gemm.c.stride + j * p.gemm.c.ld;
    store<T>(c, i, static_cast<int>(p.gemm.m), total.at, p.wide_c, j < p.gemm.n);
  } else if (const int j = index - vectors; p.bias_grad != nullptr && j < p.gemm.n) {
    const int at = p.tiles_i * p.tiles_j * kTileFloats<kI, kJ> + j;
    const auto total = add_vectors<1>(from + at, step, count);
    if (to != nullptr) {
      write(to + at, total, true);
    } else {
      store<T>(p.bias_grad + block * p.gemm.n, j, static_cast<int>(p.gemm.n), total.at, false, true);
    }
  }
}

/// How many indices add_shares has.
template <int kJ>
__host__ __device__ int share_vectors(const Problem& p) {
  return p.tiles_i * p.tiles_j * kJ * 64 + p.tiles_j * 32;
}

template <typename T, int kI, int kJ, bool kWide>
__global__ void __launch_bounds__(kSumWarps * 32, 2) sum_kernel(const Problem p) {
  constexpr int kAhead = sum_ahead(kI, kJ);
  const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4, warp = threadIdx.x / 32;
  const int output_tiles = p.tiles_i * p.tiles_j, shares = blockDim.x / 32 / output_tiles, share = warp / output_tiles;
  const int tile_i = warp % p.tiles_i, tile_j = warp / p.tiles_i % p.tiles_j;
  const int m = static_cast<int>(p.gemm.m), n = static_cast<int>(p.gemm.n);
  const auto batch = static_cast<unsigned>(p.gemm.batch);
  const int64_t block = blockIdx.x % batch, part = blockIdx.x / batch;
  const int64_t tiles = (p.gemm.k + 15) / 16, step = p.parts * shares;

  Vector<uint32_t, kI / 2> x[kAhead][4];
  Vector<uint32_t, kJ / 2> y[kAhead][4];
  const auto load_tile = [&](int ahead, int64_t tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t l = tile * 16 + i * 4 + q;
      const uint16_t* const row_x = p.a + block * p.gemm.a.stride + l * p.gemm.a.ld;
      const uint16_t* const row_y = p.b + block * p.gemm.b.stride + l * p.gemm.b.ld;
      x[ahead][i] = load<kI / 2, kWide>(row_x, tile_i * 32 + r * kI, m, l < p.gemm.k);
      y[ahead][i] = load<kJ / 2, kWide>(row_y, tile_j * 32 + r * kJ, n, l < p.gemm.k);
    }
  };
  int64_t tile = part * shares + share;
#pragma unroll
  for (int ahead = 0; ahead < kAhead; ++ahead) {
    load_tile(ahead, tile + ahead * step);
  }
  float sums[kJ / 2][kI][4] = {}, column_sums[kJ / 2][4] = {};
  const bool sum_columns = p.bias_grad != nullptr && tile_i == 0;
  constexpr uint32_t kOnes = std::is_same_v<T, c10::Half> ? 0x3c003c00 : 0x3f803f80;
  while (tile < tiles) {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead, tile += step) {
      if (tile >= tiles) {
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
      load_tile(ahead, tile + kAhead * step);
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
      const int tile = (warp % output_tiles) * kTileFloats<kI, kJ>;
      write(shared + tile + (row * 2 + e) * (32 * kI + kPad) + lane * kI, vector, true);
    }
    float* const columns = shared + output_tiles * kTileFloats<kI, kJ> + tile_j * 32;
    write(columns + r * kJ + row, column_sums[row / 2][row % 2 * 2], sum_columns && q == 0);
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
  const auto batch = static_cast<unsigned>(p.gemm.batch);
  const int64_t block = blockIdx.x % batch;
  const int index = static_cast<int>(blockIdx.x / batch * blockDim.x + threadIdx.x);
  if (index < share_vectors<kJ>(p)) {
    add_shares<T, kI, kJ>(p, block, index, p.partial + block * floats, p.gemm.batch * floats, p.parts, nullptr);
  }
}

constexpr int64_t kMaxSize = 64;
constexpr int64_t kMaxBatch = std::numeric_limits<int32_t>::max(); // thread blocks of a grid
constexpr int64_t kPartRows = 1024; // of a part of the batch, at least: what a second kernel's launch is worth

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
  p.wide_c = is_wide(p.c, p.gemm.c, p.gemm.batch, p.gemm.m, kRun<kM> * 2);
  // As many warps as have room at once; but rather tiles enough for each to be worth its W, if that keeps everything busy.
  const int64_t tiles = divide_up(p.gemm.n, 16), batch = p.gemm.batch;
  const int64_t most = processors * row_blocks(kK, kM) * kRowWarps / batch;
  const int64_t enough = std::max(divide_up(tiles, row_ahead(kK)), 4 * processors / batch);
  p.parts = std::clamp<int64_t>(std::min(most, enough), 1, tiles);
  p.parts = divide_up(tiles, divide_up(tiles, p.parts)); // the same number of tiles for all
  const int64_t warps = std::clamp<int64_t>(p.parts * batch / processors, 1, std::min<int64_t>(kRowWarps, p.parts));
  p.parts = divide_up(p.parts, warps) * warps;
  launch(row_kernel<T, kK, kM, kWide>, p.parts / warps * batch, static_cast<int>(warps) * 32, 0, p);
}

template <typename T, int kI, int kJ, bool kWide>
void run_sum(Problem p, int64_t processors) {
  p.wide_c = is_wide(p.c, p.gemm.c, p.gemm.batch, p.gemm.m, kI);
  p.tiles_i = static_cast<int>(divide_up(p.gemm.m, 32));
  p.tiles_j = static_cast<int>(divide_up(p.gemm.n, 32));
  p.parts = std::max<int64_t>(std::min(2 * processors / p.gemm.batch, p.gemm.k / kPartRows), 1);
  const int output_tiles = p.tiles_i * p.tiles_j;
  const int64_t tiles = divide_up(p.gemm.k, 16 * p.parts);
  const int64_t shares = std::clamp<int64_t>(divide_up(tiles, sum_ahead(kI, kJ)), 1, kSumWarps / output_tiles);
  c10::DataPtr partial; // of the caching allocator, which knows of streams and of graph capture
  if (p.parts > 1) {
    const auto floats = p.parts * p.gemm.batch * share_floats<kI, kJ>(p);
    partial = c10::cuda::CUDACachingAllocator::get()->allocate(floats * sizeof(float));
    p.partial = static_cast<float*>(partial.get());
  }
  const size_t shared_bytes = shares * share_floats<kI, kJ>(p) * sizeof(float);
  launch(
      sum_kernel<T, kI, kJ, kWide>,
      p.parts * p.gemm.batch,
      static_cast<int>(shares) * output_tiles * 32,
      shared_bytes,
      p
  );
  if (p.parts > 1) {
    launch(add_parts_kernel<T, kI, kJ>, divide_up(share_vectors<kJ>(p), 128) * p.gemm.batch, 128, 0, p);
  }
}

template <typename T>
bool run(const Problem& p, int64_t processors) {
  const auto& [m, n, k, batch, a, b, c] = p.gemm;
  if (!b.transpose && m <= kMaxSize && k <= kMaxSize && p.bias_grad == nullptr) {
    with_width(k, [&](auto width_k) {
      with_width(m, [&](auto width_m) {
        constexpr int kK = width_k, kM = width_m, kSquare = std::max(kK, kM);
        const int64_t of_a = a.transpose ? kRun<kK> * 2 : kRun<kM>;
        if (is_wide(p.b, b, batch, k, kRun<kK> * 2) && is_wide(p.a, a, batch, a.transpose ? k : m, of_a)) {
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
