#include "headers.h"

#ifdef BLOCKDIAG_CPU_KERNELS
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "cpu/simd/avx512.h"
#include "cpu/simd/avx512_bf16.h"

#include "cpu/microkernels/kernel.h"

namespace blockdiag::cpu {

constinit const Kernels avx512_bf16_kernels = {nullptr, run<c10::BFloat16>, nullptr};

} // namespace blockdiag::cpu
#endif
