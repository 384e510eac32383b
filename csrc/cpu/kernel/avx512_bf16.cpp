#include "headers.h"

#ifdef BLOCKDIAG_CPU_KERNELS
#define BLOCKDIAG_AVX512
#define BLOCKDIAG_AVX512_BF16
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "kernel.h"

namespace blockdiag::cpu {

constinit const Kernel<c10::BFloat16> avx512_bf16_kernel = run<c10::BFloat16>;

} // namespace blockdiag::cpu
#endif
