// Our own GEMM, compiled once per instruction set. The backend knows which of them the CPU supports.
#pragma once

#include "problem/gemm.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

// The kernels need g++'s vector extensions and target pragma.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define BLOCKDIAG_CPU_KERNELS
#endif

namespace blockdiag::cpu {

/// C = op(A) op(B), plus `bias` in each column of C unless it is null.
template <typename T>
using Kernel = void (*)(const Gemm& gemm, const T* a, const T* b, T* c, const T* bias);

/// The kernels of one instruction set, null where there is none. Half types accumulate in float32.
struct Kernels {
  Kernel<float> float32;
  Kernel<c10::BFloat16> bfloat16;
  Kernel<c10::Half> float16;
};

#ifdef BLOCKDIAG_CPU_KERNELS
extern const Kernels avx2_kernels;        // and FMA, F16C
extern const Kernels avx512_kernels;      // F, BW, DQ, VL
extern const Kernels avx512_bf16_kernels; // the same and BF16: native bfloat16 products, no other kernel
#endif

} // namespace blockdiag::cpu
