#include "cast.h"

#include "small_blocks_memory.h"

#include <algorithm>
#include <iterator>

namespace blockdiag::cuda {
namespace {

constexpr int kElements = 8; // elements that a thread casts at once: 16 bytes of results
constexpr int kThreads = 256;

/// Row y of the grid casts tensor y.
template <typename T>
__global__ void __launch_bounds__(kThreads) cast_kernel(const Casts casts) {
  const auto [from, to, elements] = casts.at[blockIdx.y];
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0;
  const int64_t step = int64_t{gridDim.x} * kThreads * kElements;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements; i < elements; i += step) {
    uint16_t* const at = static_cast<uint16_t*>(to) + i;
    if (aligned && i + kElements <= elements) {
      const auto low = read<Vector<float, 4>>(from + i, true), high = read<Vector<float, 4>>(from + i + 4, true);
      const Vector<uint32_t, 4> pairs{
          round_pair<T>(low.at[0], low.at[1]), round_pair<T>(low.at[2], low.at[3]),
          round_pair<T>(high.at[0], high.at[1]), round_pair<T>(high.at[2], high.at[3])
      };
      write(at, pairs, true);
    } else {
      for (int j = 0; j < kElements; ++j) {
        const bool valid = i + j < elements;
        write(at + j, static_cast<uint16_t>(round_pair<T>(read<float>(from + i + j, valid), 0)), valid);
      }
    }
  }
}

} // namespace

void cast_to_half(const Casts& casts, DType half) {
  int64_t rows = 0, most = 0;
  for (int64_t i = 0; i < std::ssize(casts.at); ++i) {
    most = std::max(most, casts.at[i].elements);
    rows = casts.at[i].elements > 0 ? i + 1 : rows;
  }
  if (rows == 0) {
    return;
  }
  // Enough to fill the device; a thread's further vectors cost no launch of thread blocks.
  constexpr int64_t kBlocks = 8;
  const int64_t blocks = std::min<int64_t>(
      (most + kThreads * kElements - 1) / (kThreads * kElements),
      kBlocks * at::cuda::getCurrentDeviceProperties()->multiProcessorCount
  );
  const auto kernel = half == DType::kFloat16 ? cast_kernel<c10::Half> : cast_kernel<c10::BFloat16>;
  launch(kernel, blocks, rows, kThreads, 0, casts);
}

} // namespace blockdiag::cuda
