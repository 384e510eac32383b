// How the microkernels hold and multiply elements of one type.
//
// The innermost loop works on packed elements of 32 bits. Such an element is one float, or two bfloat16 that are neighbors
// along the depth where the CPU multiplies and adds such pairs.
#pragma once

#include "cpu/simd/vector.h"

namespace blockdiag::cpu {
namespace {

/// float32 arithmetic: half types are converted when they are packed.
template <typename T>
struct Element {
  static constexpr int kDepth = 1;                               // elements of T that one packed element holds
  static constexpr bool kReadInPlace = std::is_same_v<T, float>; // without packing

  /// Packs elements that are neighbours along the depth: kLanes packed ones from `count` of T, and zeros.
  static Vector pack_along_depth(const T* data, int count) {
    return load_partial(data, count);
  }
  /// Packs `count` columns of `depth` <= kDepth rows.
  static Vector pack_across_depth(const T* data, int64_t /*ld*/, int /*depth*/, int count) {
    return load_partial(data, count);
  }
  static Vector plus_product(Vector sum, Vector a, Vector b) {
    return sum.plus_product(a, b);
  }
};

} // namespace
} // namespace blockdiag::cpu
