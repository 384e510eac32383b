// Executes the GEMM description on a GPU.
#pragma once

#include "../gemm.h"

#include <c10/core/ScalarType.h>

#include <optional>
#include <string>

namespace blockdiag::cuda {

/// Runs `gemm` on matrices of `dtype` on the current device and stream; adds to what C holds if `accumulate`, and
/// overwrites it if not. C must not overlap A or B, and no size may be 0.
void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate);

/// The same by cuBLASLt, with `bias`, if it is not null, added in the same kernel: contiguous, gemm.m elements for each
/// block. Does nothing and returns false where cuBLASLt has no algorithm.
bool run_lt_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c);

/// The same, of a weight's gradient, with the gradient of the bias in the same kernel: B summed over k into `bias_grad`,
/// contiguous, gemm.n elements for each block. Does nothing and returns false also where that is not known to be faster than
/// a kernel of its own for the sum.
bool run_lt_weight_bias_grad(
    const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, void* bias_grad
);

/// Whether run_lt_weight_bias_grad may compute anything. Not in deterministic mode: how its kernels sum is not documented.
bool may_fuse_bias_grad();

/// How often cuBLASLt was called, in words.
std::string lt_calls();

/// What computes; cuBLAS does what another cannot.
enum class Library { kCublas, kCublasLt };
Library preferred_library();

/// Sets the library by name, if one is given, for the whole process, and returns the name. At first it is what
/// BLOCKDIAG_CUDA_GEMM says, or cublas.
std::string preferred_gemm(const std::optional<std::string>& name = std::nullopt);

/// The versions of cuBLAS built with and found.
std::string cublas_versions();

} // namespace blockdiag::cuda
