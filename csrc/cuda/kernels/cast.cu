#include "cast.h"

#include "device.h"

#include <c10/util/BFloat16.h>

#include <algorithm>

namespace blockdiag::cuda {
namespace {

constexpr int kVector = 8; // elements that a thread casts at once: 16 bytes of results
constexpr int kThreads = 256;

/// Row y of the grid casts tensor y.
template <typename T>
__global__ void __launch_bounds__(kThreads) cast_kernel(const Casts casts) {
  const Cast& cast = casts[blockIdx.y];
  const bool aligned = reinterpret_cast<uintptr_t>(cast.from) % sizeof(float4) == 0;
  const int64_t step = int64_t{gridDim.x} * kThreads * kVector;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kVector; i < cast.elements; i += step) {
    T* const to = static_cast<T*>(cast.to) + i;
    if (aligned && i + kVector <= cast.elements) {
      const auto* const from = reinterpret_cast<const float4*>(cast.from + i);
      const float4 low = from[0], high = from[1];
      const T values[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      uint4 word;
      memcpy(&word, values, sizeof(word));
      *reinterpret_cast<uint4*>(to) = word;
    } else {
      for (int64_t j = 0; j < kVector && i + j < cast.elements; ++j) {
        to[j] = T(cast.from[i + j]);
      }
    }
  }
}

} // namespace

void cast_to_half(const Casts& casts, DType half) {
  int64_t count = 0, most = 0;
  for (const auto& cast : casts) {
    most = std::max(most, cast.elements);
    count += cast.elements > 0;
  }
  if (count == 0) {
    return;
  }
  // Enough to fill the device; a thread's further vectors cost no launch of thread blocks.
  constexpr int64_t kBlocks = 8;
  const int64_t blocks = std::min<int64_t>(
      (most + kThreads * kVector - 1) / (kThreads * kVector),
      kBlocks * at::cuda::getCurrentDeviceProperties()->multiProcessorCount
  );
  const auto kernel = half == DType::kFloat16 ? cast_kernel<c10::Half> : cast_kernel<c10::BFloat16>;
  launch(kernel, blocks, count, kThreads, 0, casts);
}

} // namespace blockdiag::cuda
