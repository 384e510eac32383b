#include "headers.h"

#ifdef BLOCKDIAG_CPU_KERNELS
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#include "cpu/simd/avx512.h"
#include "cpu/simd/avx512_bf16.h"

#include "cpu/microkernels/kernel.h"

namespace blockdiag::cpu {

Kernel avx512_bf16_kernel(const GemmProblem& problem) {
  return problem.dtype == DType::kBFloat16 ? find_kernel<BFloat16Pairs, c10::BFloat16>(problem.float32) : nullptr;
}

} // namespace blockdiag::cpu
#endif
