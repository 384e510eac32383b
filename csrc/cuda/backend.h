// Computes problems on a GPU: on the current device and stream.
#pragma once

#include "problem/providers.h"

#include <string>

namespace blockdiag::cuda {

/// Kernels of our own for small blocks, cuBLASLt, cuBLAS. What has not run on a GPU is not asked by default: cuBLAS is
/// preferred, or what the environment variable BLOCKDIAG_CUDA_GEMM names.
Providers& backend();

/// The versions of cuBLAS built with and found.
std::string cublas_versions();

/// How often cuBLASLt was asked, and computed, in words.
std::string cublaslt_calls();

bool cublas_takes(const GemmProblem& problem);
bool cublas_run(const GemmProblem& problem, const Operands& operands);

bool cublaslt_takes(const GemmProblem& problem);
bool cublaslt_run(const GemmProblem& problem, const Operands& operands);

} // namespace blockdiag::cuda
