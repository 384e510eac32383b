// Executes the GEMM description on a CPU.
#pragma once

#include "../gemm.h"

#include <c10/core/ScalarType.h>

#include <string>

namespace blockdiag::cpu {

/// Runs `gemm` on matrices of `dtype`, and adds `bias`, batch x m and contiguous, to each of C's columns unless it is null.
/// C must not overlap A or B, and no size may be 0.
void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, const void* bias);

/// What computes the GEMMs, chosen when first asked for: our own kernels by their instruction set, which compute
/// float32 and half types, and the library that computes the rest.
std::string gemm_library();

} // namespace blockdiag::cpu
