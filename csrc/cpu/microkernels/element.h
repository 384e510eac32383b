// What the innermost loop multiplies: packed elements of 32 bits, how they are packed, and multiply-add.
#pragma once

#include "cpu/simd/vector.h"

namespace blockdiag::cpu {
namespace {

/// One float. Half types are converted when they are packed.
struct Floats {
  using Element = float;
  static constexpr int kDepth = 1; // elements per packed element

  /// Whether elements of T need no packing.
  template <typename T>
  static constexpr bool kReadInPlace = std::is_same_v<T, Element>;

  /// Packs neighbors along the depth: kLanes packed elements from `count` of T, padded with zeros.
  template <typename T>
  static Vector pack_along_depth(const T* data, int count) {
    return load_partial(data, count);
  }
  /// Packs `count` columns of `depth` <= kDepth rows.
  template <typename T>
  static Vector pack_across_depth(const T* data, int64_t /*ld*/, int /*depth*/, int count) {
    return load_partial(data, count);
  }
  static Vector plus_product(Vector sum, Vector a, Vector b) { return sum.plus_product(a, b); }
};

/// Elements that are float32 or of a problem's half type, or none: where they are read so seldom that code for each type
/// is not worth compiling.
template <typename Half>
struct Elements {
  const float* single;
  const Half* half;

  explicit operator bool() const { return single != nullptr || half != nullptr; }
  Elements operator+(int64_t offset) const {
    return {single == nullptr ? nullptr : single + offset, half == nullptr ? nullptr : half + offset};
  }
  float operator[](int64_t i) const { return single != nullptr ? single[i] : static_cast<float>(half[i]); }
  Vector load(int64_t i, int count) const {
    return single != nullptr ? load_partial(single + i, count) : load_partial(half + i, count);
  }
};

} // namespace
} // namespace blockdiag::cpu
