// Executes the GEMM description on a CPU.
#pragma once

#include "../gemm.h"

#include <c10/core/ScalarType.h>

namespace blockdiag::cpu {

/// Runs `gemm` on matrices of `dtype`; adds to what C holds if `accumulate`, and overwrites it if not. C must not overlap
/// A or B, and no size may be 0.
void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate);

/// The library that computes the GEMMs, chosen when this one is loaded: "mkl" or "aten".
const char* gemm_library();

} // namespace blockdiag::cpu
