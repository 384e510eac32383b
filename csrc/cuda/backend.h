// The CUDA backend, on the current device and stream.
#pragma once

#include "problem/providers.h"

#include <string>

namespace blockdiag::cuda {

/// Our own kernels for small blocks, all that cuBLASLt can fuse, what of it is proven, cuBLAS. The default is the third,
/// as the first two have not run on a GPU as they are now, or the one that the environment variable BLOCKDIAG_CUDA_GEMM
/// names.
Providers& backend();

/// Whether one of the first two is preferred: what has not run on a GPU is reached through them alone.
bool fuses();

/// The versions of cuBLAS at build time and at run time.
std::string cublas_versions();

/// Call counts of cuBLASLt, as text.
std::string cublaslt_calls();

bool cublas_takes(const GemmProblem& problem);
bool cublas_run(const GemmProblem& problem, const Operands& operands);

/// Beside what cublaslt_takes: float32 results of half operands, the gradient of a bias without tuning, and biases of one
/// row or column.
bool fused_takes(const GemmProblem& problem);
bool fused_run(const GemmProblem& problem, const Operands& operands);

bool cublaslt_takes(const GemmProblem& problem);
bool cublaslt_run(const GemmProblem& problem, const Operands& operands);

} // namespace blockdiag::cuda
