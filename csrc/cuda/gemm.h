// Executes the GEMM description on a GPU.
#pragma once

#include "../gemm.h"

#include <c10/core/ScalarType.h>

#include <string>

namespace blockdiag::cuda {

/// Runs `gemm` on matrices of `dtype` on the current device and stream; adds to what C holds if `accumulate`, and
/// overwrites it if not. C must not overlap A or B, and no size may be 0.
void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate);

/// The versions of cuBLAS built with and found.
std::string cublas_versions();

} // namespace blockdiag::cuda
