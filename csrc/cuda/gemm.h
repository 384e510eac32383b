// Executes the GEMM description on a GPU.
#pragma once

#include "../gemm.h"

#include <c10/core/ScalarType.h>

#include <string>

namespace blockdiag::cuda {

/// Runs `gemm` on matrices of `dtype` on the current device and stream; adds to what C holds if `accumulate`, and
/// overwrites it if not. C must not overlap A or B, and no size may be 0.
void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate);

/// The same by cuBLASLt, with `bias`, if it is not null, added in the same kernel: contiguous, gemm.m elements for each
/// block. Does nothing and returns false where cuBLASLt has no algorithm.
bool run_lt_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c);

/// How often run_lt_gemm was called, in words.
std::string lt_calls();

/// What computes: "cublas", or "cublaslt" where it can, as BLOCKDIAG_CUDA_GEMM asks.
const std::string& gemm_library();

/// The versions of cuBLAS built with and found.
std::string cublas_versions();

} // namespace blockdiag::cuda
