// The CUDA backend, on the current device and stream.
#pragma once

#include "problem/providers.h"

#include <string>

namespace blockdiag::cuda {

/// Our own kernels for small blocks, cuBLASLt, cuBLAS. The default is cuBLAS, as the others have not run on a GPU yet,
/// or the one that the environment variable BLOCKDIAG_CUDA_GEMM names.
Providers& backend();

/// The versions of cuBLAS at build time and at run time.
std::string cublas_versions();

/// Call counts of cuBLASLt, as text.
std::string cublaslt_calls();

bool cublas_takes(const GemmProblem& problem);
bool cublas_run(const GemmProblem& problem, const Operands& operands);

bool cublaslt_takes(const GemmProblem& problem);
bool cublaslt_run(const GemmProblem& problem, const Operands& operands);

} // namespace blockdiag::cuda
