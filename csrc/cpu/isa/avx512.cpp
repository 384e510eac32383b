#include "headers.h"

#ifdef BLOCKDIAG_CPU_KERNELS
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#include "cpu/simd/avx512.h"

#include "cpu/microkernels/kernel.h"
#include "cpu/microkernels/sparse.h"

namespace blockdiag::cpu {

Kernel avx512_kernel(const GemmProblem& problem) { return find_kernel(problem); }

bool avx512_sparse(const SparseProblem& problem, const SparseOperands& operands) {
  return run_sparse(problem, operands);
}

} // namespace blockdiag::cpu
#endif
