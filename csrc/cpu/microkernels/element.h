// Element types of the microkernels: packing and multiply-add.
//
// The innermost loop works on packed elements of 32 bits: one float or, on CPUs that multiply and add pairs, two
// bfloat16 that are neighbors along the depth.
#pragma once

#include "cpu/simd/vector.h"

namespace blockdiag::cpu {
namespace {

/// float32 arithmetic: half types are converted when they are packed.
template <typename T>
struct Element {
  static constexpr int kDepth = 1;                               // elements of T per packed element
  static constexpr bool kReadInPlace = std::is_same_v<T, float>; // without packing

  /// Packs neighbors along the depth: kLanes packed elements from `count` of T, padded with zeros.
  static Vector pack_along_depth(const T* data, int count) { return load_partial(data, count); }
  /// Packs `count` columns of `depth` <= kDepth rows.
  static Vector pack_across_depth(const T* data, int64_t /*ld*/, int /*depth*/, int count) {
    return load_partial(data, count);
  }
  static Vector plus_product(Vector sum, Vector a, Vector b) { return sum.plus_product(a, b); }
};

} // namespace
} // namespace blockdiag::cpu
