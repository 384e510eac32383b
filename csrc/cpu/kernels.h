// Our own kernels, compiled once per instruction set. The backend knows which of them the CPU supports.
#pragma once

#include "problem/gemm.h"
#include "problem/sparse.h"

// The kernels need g++'s vector extensions and target pragma.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BLOCKDIAG_CPU_KERNELS
#endif

namespace blockdiag::cpu {

/// Computes a problem, with float32 sums. Not its `accumulate`, and its `bias_grad` only for a transposed B.
using Kernel = void (*)(const GemmProblem& problem, const Operands& operands);

#ifdef BLOCKDIAG_CPU_KERNELS

// The kernel of an instruction set for a problem's dtypes; null if there is none.

Kernel avx2_kernel(const GemmProblem& problem);        // and FMA, F16C
Kernel avx512_kernel(const GemmProblem& problem);      // F, BW, DQ, VL
Kernel avx512_bf16_kernel(const GemmProblem& problem); // the same and BF16: native bfloat16 products, no other kernel

// Compute a block-sparse product with float32 sums; false for other dtypes.

bool avx2_sparse(const SparseProblem& problem, const SparseOperands& operands);
bool avx512_sparse(const SparseProblem& problem, const SparseOperands& operands);

#endif

} // namespace blockdiag::cpu
