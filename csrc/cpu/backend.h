// The CPU backend.
#pragma once

#include "problem/providers.h"

namespace blockdiag::cpu {

/// Our own kernels by instruction set, for float32 and half types; MKL, if torch has it; ATen. The default is the first
/// available, or the one that the environment variable BLOCKDIAG_CPU_GEMM names.
Providers& backend();

// The libraries behind our own kernels. Each takes a bias, which it writes to C before the product is added.

bool mkl_is_available();
bool mkl_takes(const GemmProblem& problem);
bool mkl_run(const GemmProblem& problem, const Operands& operands);

bool aten_takes(const GemmProblem& problem);
bool aten_run(const GemmProblem& problem, const Operands& operands);

/// Plain loops, for every dtype and CPU: ATen has no product with blocks of any shape.
bool portable_sparse(const SparseProblem& problem, const SparseOperands& operands);

/// Writes the bias, if any, to C. Returns the problem that adds the product to it.
GemmProblem with_bias_written(const GemmProblem& problem, const Operands& operands);

} // namespace blockdiag::cpu
