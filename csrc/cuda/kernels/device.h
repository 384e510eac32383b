// The device intrinsics of the kernels; tests/cpp/emulated_cuda.h emulates them on a CPU.
#pragma once

#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Half.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace blockdiag::cuda {
namespace {

/// The type of `size` bytes that one instruction moves; the compiler moves a struct member by member.
template <size_t size>
using Word = std::conditional_t<
    size == 16, uint4, std::conditional_t<size == 8, uint2, std::conditional_t<size == 4, uint32_t, uint16_t>>>;

/// `*from`, or zeros if not `valid`.
template <typename V>
__device__ __forceinline__ V read(const void* from, bool valid) {
  return __builtin_bit_cast(V, valid ? *static_cast<const Word<sizeof(V)>*>(from) : Word<sizeof(V)>());
}

/// Stores to global memory. In assembly, as the compiler splits an assignment in a branch into four instructions.
template <typename V>
__device__ __forceinline__ void write(void* to, const V& value, bool valid) {
  const auto word = __builtin_bit_cast(Word<sizeof(V)>, value);
  if (!valid) {
    return;
  }
  if constexpr (sizeof(V) == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w));
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(to), "r"(word.x), "r"(word.y));
  } else {
    *static_cast<Word<sizeof(V)>*>(to) = word;
  }
}

template <typename V>
__device__ __forceinline__ void write_shared(void* to, const V& value, bool valid) {
  if (valid) {
    *static_cast<Word<sizeof(V)>*>(to) = __builtin_bit_cast(Word<sizeof(V)>, value);
  }
}

__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float4 shared[];
  return reinterpret_cast<float*>(shared);
}

/// Two numbers rounded to T, the first in the lower half.
template <typename T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    return __builtin_bit_cast(uint32_t, __half2_raw(__floats2half2_rn(low, high)));
  } else {
    return __builtin_bit_cast(uint32_t, __nv_bfloat162_raw(__floats2bfloat162_rn(low, high)));
  }
}

/// d += A B for a 16 x 16 A, by rows, and a 16 x 8 B, by columns.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, c10::Half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  __trap(); // unreachable: small_blocks_take checks the device
#endif
}

template <typename... Arguments>
void launch(
    void (*kernel)(Arguments...), int64_t x, int64_t y, int64_t threads, size_t shared_bytes, Arguments... arguments
) {
  const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
  const auto stream = c10::cuda::getCurrentCUDAStream();
  kernel<<<grid, static_cast<unsigned>(threads), shared_bytes, stream>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace
} // namespace blockdiag::cuda
