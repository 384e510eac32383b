#include "headers.h"

#ifdef BLOCKDIAG_CPU_KERNELS
#pragma GCC target("avx2,fma,f16c")
#include "cpu/simd/avx2.h"

#include "cpu/microkernels/kernel.h"
#include "cpu/microkernels/sparse.h"

namespace blockdiag::cpu {

Kernel avx2_kernel(const GemmProblem& problem) { return find_kernel(problem); }

bool avx2_sparse(const SparseProblem& problem, const SparseOperands& operands) { return run_sparse(problem, operands); }

} // namespace blockdiag::cpu
#endif
