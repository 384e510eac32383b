#include "headers.h"

#ifdef BLOCKDIAG_CPU_KERNELS
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#include "cpu/simd/avx512.h"

#include "cpu/microkernels/kernel.h"

namespace blockdiag::cpu {

constinit const Kernels avx512_kernels = {run<float>, run<c10::BFloat16>, run<c10::Half>};

} // namespace blockdiag::cpu
#endif
