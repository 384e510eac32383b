// Small blocks on tensor cores. Both kernels are memory bound, so only data movement matters.
//
// Operands bypass shared memory: they go from global memory to the registers of the threads that multiply them, and
// back, in vectors of up to 16 bytes. That takes a permutation. In mma.m16n8k16 thread (r, q) = (lane / 4, lane % 4)
// holds elements 2q, 2q + 1, 2q + 8 and 2q + 9 of rows r and r + 8 of A and of column r of B, and of the result rows r
// and r + 8 in columns 2q and 2q + 1 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"). A sum
// does not depend on the order of its terms, nor a row of a product on the other rows. So thread q takes eight
// neighbors in memory as its share of two mma's, for both operands alike, and rows are assigned to mma's such that a
// thread's results are neighbors.
//
// Pairs of elements share a register, the first in its lower half. Elements outside of a matrix are zero, never read.
#include "small_blocks.h"

#include "small_blocks_rows.h"
#include "small_blocks_sum.h"

#include <algorithm>
#include <atomic>
#include <limits>

namespace blockdiag::cuda {
namespace {

constexpr int64_t kMaxSize = 64;
constexpr int64_t kMaxBatch = std::numeric_limits<int32_t>::max() / 4; // a grid's thread blocks, up to 4 for each block
constexpr int64_t kPartRows = 256;                                     // rows of a part; to be measured

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Whether every row, of `size` elements of E, divides into the aligned vectors by which the kernels read and write N.
template <typename E, int N>
bool is_wide(const void* pointer, const Operand& operand, int64_t batch, int64_t size) {
  const int64_t offsets = size | operand.ld | (batch > 1 ? operand.stride : 0);
  return reinterpret_cast<uintptr_t>(pointer) % (kVector<E, N> * sizeof(E)) == 0 && offsets % kVector<E, N> == 0;
}

template <int N>
bool is_wide_c(const Problem& p) {
  const auto& [m, n, k, batch, a, b, c] = p.gemm;
  return p.float32.c ? is_wide<float, N>(p.c, c, batch, m) : is_wide<uint16_t, N>(p.c, c, batch, m);
}

/// Calls `function` with the smallest of the constants 16, 32 and 64 that `size` fits in.
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

template <typename T, typename A, typename B, int kK, int kM, bool kWide>
void launch_rows(Problem p, int64_t processors) {
  p.wide_c = is_wide_c<kM / 8>(p);
  // As many warps as are resident at once, or fewer if that gives each enough tiles to repay loading W and leaves 4
  // warps per multiprocessor.
  const int64_t tiles = divide_up(p.gemm.n, 8), batch = p.gemm.batch;
  const int64_t most = processors * kRowBlocks<A, kK, kM> * kRowWarps / batch;
  const int64_t enough = std::max(divide_up(tiles, kRowAhead<B, kK>), 4 * processors / batch);
  p.parts = std::clamp<int64_t>(std::min(most, enough), 1, tiles);
  p.parts = divide_up(tiles, divide_up(tiles, p.parts)); // the same number of tiles for all
  const int64_t warps = std::min({divide_up(p.parts * batch, processors), p.parts, int64_t{kRowWarps}});
  p.parts = divide_up(p.parts, warps) * warps;
  launch(row_kernel<T, A, B, kK, kM, kWide>, batch, p.parts / warps, warps * 32, 0, p);
}

template <typename T, typename A, int kI, int kJ, bool kWide>
void launch_sum(Problem p, int64_t processors) {
  p.wide_c = is_wide_c<kI>(p);
  p.tiles_i = p.gemm.m > 32 ? 2 : 1;
  p.tiles_j = p.gemm.n > 32 ? 2 : 1;
  const int64_t blocks = p.gemm.batch * p.tiles_i * p.tiles_j;
  if (p.parts = 1; p.gemm.k >= small_blocks_split_rows()) {
    p.parts = std::clamp<int64_t>(2 * processors / blocks, 1, std::max<int64_t>(p.gemm.k / kPartRows, 1));
  }
  const int64_t tiles = divide_up(p.gemm.k, 16 * p.parts);
  const int64_t shares = std::clamp<int64_t>(divide_up(tiles, kSumAhead<A, T, kI, kJ, kWide>), 1, kSumWarps);
  constexpr int64_t kBytes = kShareFloats<kI, kJ> * sizeof(float);
  c10::DataPtr partial; // the caching allocator tracks streams and graph capture
  if (p.parts > 1) {
    partial = c10::cuda::CUDACachingAllocator::get()->allocate(p.parts * blocks * kBytes);
    p.partial = static_cast<float*>(partial.get());
  }
  launch(sum_kernel<T, A, kI, kJ, kWide>, blocks, p.parts, shares * 32, shares * kBytes, p);
  if (p.parts > 1) {
    launch(add_parts_kernel<T, kI, kJ>, blocks, divide_up(kShareVectors<kJ>, 128), 128, 0, p);
  }
}

/// Whether the problem is activation times weight, rather than a sum over the batch.
bool is_rows(const Gemm& gemm) { return !gemm.b.transpose; }

template <typename T, typename A, typename B>
void run_rows(const Problem& p, int64_t processors) {
  const auto& [m, n, k, batch, a, b, c] = p.gemm;
  with_width(k, [&](auto width_k) {
    with_width(m, [&](auto width_m) {
      constexpr int kK = width_k, kM = width_m, kSquare = std::max(kK, kM), kShare = kPiece<B, kK>;
      const bool wide_a = a.transpose ? is_wide<A, kShare>(p.a, a, batch, k) : is_wide<A, kM / 8>(p.a, a, batch, m);
      if (wide_a && is_wide<B, kShare>(p.b, b, batch, k)) {
        launch_rows<T, A, B, kK, kM, true>(p, processors);
      } else {
        launch_rows<T, A, B, kSquare, kSquare, false>(p, processors);
      }
    });
  });
}

template <typename T, typename A>
void run_sum(const Problem& p, int64_t processors) {
  const auto& [m, n, k, batch, a, b, c] = p.gemm;
  with_width(std::min<int64_t>(m, 32), [&](auto width_m) {
    with_width(std::min<int64_t>(n, 32), [&](auto width_n) {
      constexpr int kI = std::min<int>(width_m, 32) / 8, kJ = std::min<int>(width_n, 32) / 8;
      if (is_wide<A, kI>(p.a, a, batch, m) && is_wide<T, kJ>(p.b, b, batch, n)) {
        launch_sum<T, A, kI, kJ, true>(p, processors);
      } else {
        launch_sum<T, A, 4, 4, false>(p, processors);
      }
    });
  });
}

template <typename T>
void run(const Problem& p, int64_t processors) {
  if (!is_rows(p.gemm)) {
    p.float32.a ? run_sum<T, float>(p, processors) : run_sum<T, T>(p, processors);
  } else if (p.float32.b) {
    run_rows<T, float, float>(p, processors);
  } else {
    p.float32.a ? run_rows<T, float, T>(p, processors) : run_rows<T, T, T>(p, processors);
  }
}

} // namespace

std::atomic<int64_t>& small_blocks_split_rows() {
  static std::atomic<int64_t> rows = 1024;
  return rows;
}

bool small_blocks_take(const GemmProblem& problem) {
  const auto& [gemm, dtype, epilogue, float32] = problem;
  if (!is_half(dtype) || epilogue.accumulate || gemm.batch > kMaxBatch || gemm.c.transpose ||
      at::cuda::getCurrentDeviceProperties()->major < 8) {
    return false;
  }
  return is_rows(gemm) ? gemm.m <= kMaxSize && gemm.k <= kMaxSize && !epilogue.bias_grad && (float32.a || !float32.b)
                       : !gemm.a.transpose && gemm.m <= kMaxSize && gemm.n <= kMaxSize && !epilogue.bias && !float32.b;
}

bool run_small_blocks(const GemmProblem& problem, const Operands& operands) {
  Problem p{};
  p.gemm = problem.gemm;
  p.float32 = problem.float32;
  p.a = operands.a;
  p.b = operands.b;
  p.bias = operands.bias;
  p.c = operands.c;
  p.bias_grad = operands.bias_grad;
  const int64_t processors = at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
  problem.dtype == DType::kFloat16 ? run<c10::Half>(p, processors) : run<c10::BFloat16>(p, processors);
  return true;
}

} // namespace blockdiag::cuda
