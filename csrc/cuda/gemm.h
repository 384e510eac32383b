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

/// Whether one kernel may compute the gradients of weight and bias.
bool may_fuse_bias_grad(c10::ScalarType dtype);

/// How often cuBLASLt was called, in words.
std::string lt_calls();

/// What computes: each what it can, and the one before it the rest. The last is of our own.
enum class Library { kCublas, kCublasLt, kSmallBlocks };
Library preferred_library();

/// Sets the library by name, if one is given, for the whole process, and returns the name. At first it is what
/// BLOCKDIAG_CUDA_GEMM says, or cublas.
std::string preferred_gemm(const std::optional<std::string>& name = std::nullopt);

/// The versions of cuBLAS built with and found.
std::string cublas_versions();

} // namespace blockdiag::cuda
