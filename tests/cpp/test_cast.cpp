// The kernel that casts several tensors in one launch, on a CPU.
#include "../../csrc/cuda/kernels/cast.cu"
#include "matrices.h"

#include <algorithm>
#include <cstdio>

namespace {

using blockdiag::DType;
using blockdiag::cuda::Casts;

/// Tensors of these sizes, each starting `misalignment` elements behind a boundary.
template <typename T>
void test_casts(Random& random, const std::array<int64_t, 3>& sizes, int64_t misalignment) {
  std::vector<std::unique_ptr<Matrices<T>>> tensors, results;
  Casts casts{};
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) {
      continue;
    }
    const Blocks row{1, sizes[i], sizes[i], 1, 0};
    auto& from = *tensors.emplace_back(std::make_unique<Matrices<T>>(row, 1, true, misalignment, false));
    auto& to = *results.emplace_back(std::make_unique<Matrices<T>>(row, 1, false, 0, true));
    for (int64_t j = 0; j < sizes[i]; ++j) {
      from.set(0, 0, j, random.number());
    }
    casts.at[i] = {reinterpret_cast<const float*>(from.data()), to.data(), sizes[i]};
  }
  const auto before = emulated::machine().launches;
  blockdiag::cuda::cast_to_half(casts, std::is_same_v<T, c10::Half> ? DType::kFloat16 : DType::kBFloat16);
  if (emulated::machine().launches != before + (tensors.empty() ? 0 : 1)) {
    emulated::fail("all tensors in one launch, and none for nothing");
  }
  for (size_t i = 0; i < tensors.size(); ++i) {
    for (int64_t j = 0; j < tensors[i]->blocks.cols; ++j) {
      if (results[i]->value(0, 0, j) != tensors[i]->factor(0, 0, j)) {
        emulated::fail("a cast rounds as torch does");
      }
    }
  }
}

} // namespace

int main() {
  Random random;
  emulated::machine().processors = 1; // so that threads have several vectors
  constexpr std::array<int64_t, 3> kSizes[] = {{1, 2, 3},       {0, 0, 0},   {0, 5, 0},    {8, 0, 16},
                                               {2048, 7, 2049}, {0, 0, 100}, {40000, 9, 0}};
  for (const auto& sizes : kSizes) {
    for (int64_t misalignment = 0; misalignment < 4; ++misalignment) {
      test_casts<c10::Half>(random, sizes, misalignment);
      test_casts<c10::BFloat16>(random, sizes, misalignment);
    }
  }
  std::puts("all passed");
}
