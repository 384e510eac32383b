#include "headers.h"

#ifdef BLOCKDIAG_CPU_KERNELS
#pragma GCC target("avx2,fma,f16c")
#include "cpu/simd/avx2.h"

#include "cpu/microkernels/kernel.h"

namespace blockdiag::cpu {

constinit const Kernels avx2_kernels = {run<float>, run<c10::BFloat16>, run<c10::Half>};

} // namespace blockdiag::cpu
#endif
