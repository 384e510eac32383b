// The key to the choice of a cuBLASLt algorithm. Independent of CUDA and torch: tested on a CPU.
#pragma once

#include "problem/gemm.h"

#include <array>
#include <bit>
#include <cstdint>
#include <tuple>

namespace blockdiag::cuda {

/// The largest power of two, up to 256, that divides the address of every block's first element.
inline int64_t alignment(uint64_t address, int64_t stride_bytes, int64_t batch) {
  const uint64_t bits = address | (batch > 1 ? static_cast<uint64_t>(stride_bytes) : 0) | 256;
  return int64_t{1} << std::countr_zero(bits);
}

/// All that cuBLASLt's heuristic reads and a choice among its algorithms depends on. Equal problems share a plan.
struct LtProblem : GemmProblem {
  int64_t device, compute_type;
  int64_t reductions;                // allowed for split sums: a mask of cublasLtReductionScheme_t
  std::array<int64_t, 4> alignments; // of A, B, C and the bias or its gradient
  int64_t workspace;                 // bytes allowed
  bool deterministic;                // choices measured without it were not checked for it

  /// The fields by name, in the order of a key. `device` is the ordinal.
  static constexpr std::array kFields = {
      "m",           "n",           "k",           "batch",          "transpose_a", "lda",
      "stride_a",    "transpose_b", "ldb",         "stride_b",       "transpose_c", "ldc",
      "stride_c",    "device",      "dtype",       "compute_type",   "epilogue",    "reductions",
      "alignment_a", "alignment_b", "alignment_c", "alignment_bias", "workspace",   "deterministic",
      "float32_c",
  };

  using Key = std::array<int64_t, kFields.size()>;

  Key key() const {
    const auto& [a, b, c] = std::tie(gemm.a, gemm.b, gemm.c);
    return {
        gemm.m,
        gemm.n,
        gemm.k,
        gemm.batch,
        a.transpose,
        a.ld,
        a.stride,
        b.transpose,
        b.ld,
        b.stride,
        c.transpose,
        c.ld,
        c.stride,
        device,
        static_cast<int64_t>(dtype),
        compute_type,
        epilogue.bias + 2 * epilogue.bias_grad,
        reductions,
        alignments[0],
        alignments[1],
        alignments[2],
        alignments[3],
        workspace,
        deterministic,
        float32.c,
    };
  }
};

/// Multiplies each number in by the 64 bits of the golden ratio, and folds the better mixed upper half onto the lower.
struct KeyHash {
  size_t operator()(const LtProblem::Key& key) const {
    uint64_t hash = 0;
    for (const int64_t number : key) {
      hash = (hash ^ static_cast<uint64_t>(number)) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
    return static_cast<size_t>(hash);
  }
};

} // namespace blockdiag::cuda
