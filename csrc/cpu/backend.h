// Computes problems on a CPU.
#pragma once

#include "problem/providers.h"

namespace blockdiag::cpu {

/// Our own kernels by instruction set, for float32 and half types; MKL, if torch has it; ATen. At first the best is
/// preferred, or what the environment variable BLOCKDIAG_CPU_GEMM names.
Providers& backend();

// What stands in for kernels of our own. Each takes every dtype that it computes, and a bias, which it writes to C first.

bool mkl_is_available();
bool mkl_takes(const GemmProblem& problem);
bool mkl_run(const GemmProblem& problem, const Operands& operands);

bool aten_takes(const GemmProblem& problem);
bool aten_run(const GemmProblem& problem, const Operands& operands);

/// Writes the bias, if the problem has one, to C; what is left is to be added to that.
GemmProblem with_bias_written(const GemmProblem& problem, const Operands& operands);

} // namespace blockdiag::cpu
