// The instruction sets that our own GEMM is compiled for. Which of them the CPU has is for the caller to know.
#pragma once

#include "../../gemm.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

// The kernels use g++'s vectors and target pragma.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BLOCKDIAG_CPU_KERNELS
#endif

namespace blockdiag::cpu {

/// C = op(A) op(B), to which `bias`, batch x m and contiguous, is added in each of C's columns unless it is null. No size may
/// be 0.
template <typename T>
using Kernel = void (*)(const Gemm& gemm, const T* a, const T* b, T* c, const T* bias);

/// Both compute half types in float32.
struct Kernels {
  Kernel<float> float32;
  Kernel<c10::BFloat16> bfloat16;
  Kernel<c10::Half> float16;
};

#ifdef BLOCKDIAG_CPU_KERNELS
extern const Kernels avx2_kernels;                     // and FMA, F16C
extern const Kernels avx512_kernels;                   // F, BW, DQ, VL
extern const Kernel<c10::BFloat16> avx512_bf16_kernel; // the same and BF16: multiplies bfloat16 as it is
#endif

} // namespace blockdiag::cpu
