// Sums of the left operand over the depth: the gradient of a bias, beside that of its weight.
#pragma once

#include "element.h"
#include "thresholds.h"

namespace blockdiag::cpu {
namespace {

/// Adds to sums(i) the sum over p < depth of the left operand, (i, p) at i + p * ld. Parts of kPanelDepth are summed in
/// float32, and added in double: batches are long, and a bias has no other terms that would hide an error.
template <typename T>
void add_over_depth(const T* left, int64_t ld, int64_t rows, int64_t depth, double* sums) {
  for (; depth > kPanelDepth; depth -= kPanelDepth, left += kPanelDepth * ld) {
    add_over_depth(left, ld, rows, kPanelDepth, sums);
  }
  constexpr int kChains = 4; // to hide the latency of an addition
  for (int64_t i = 0; i < rows; i += Vector::kLanes) {
    const auto count = static_cast<int>(std::min<int64_t>(rows - i, Vector::kLanes));
    Vector chains[kChains];
    for (auto& chain : chains) {
      chain = Vector::zero();
    }
    int64_t p = 0;
    for (; p + kChains <= depth; p += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        chains[c] = chains[c] + load_partial(left + (p + c) * ld + i, count);
      }
    }
    for (; p < depth; ++p) {
      chains[0] = chains[0] + load_partial(left + p * ld + i, count);
    }
    const auto total = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    float totals[Vector::kLanes];
    Vector::store(total, totals);
    for (int lane = 0; lane < count; ++lane) {
      sums[i + lane] += totals[lane];
    }
  }
}

} // namespace
} // namespace blockdiag::cpu
