// Native bfloat16 products with AVX-512 BF16.
#pragma once

#include "cpu/microkernels/element.h"

namespace blockdiag::cpu {
namespace {

/// Two bfloat16 that are neighbors along the depth, whose products are added in float32. The instruction flushes
/// subnormal operands and sums to zero. float32 elements are rounded when they are packed.
struct BFloat16Pairs {
  using Element = c10::BFloat16;
  static constexpr int kDepth = 2;

  template <typename T>
  static constexpr bool kReadInPlace = std::is_same_v<T, Element>;

  static Vector pack_along_depth(const c10::BFloat16* data, int count) {
    const auto lanes = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, data))};
  }
  static Vector pack_along_depth(const float* data, int count) {
    const auto low = load_partial(data, std::min(count, Vector::kLanes));
    const auto high =
        count <= Vector::kLanes ? Vector::zero() : load_partial(data + Vector::kLanes, count - Vector::kLanes);
    return {(__m512)_mm512_cvtne2ps_pbh(high.value, low.value)};
  }
  /// The first row is in the lower halves of the pairs.
  template <typename T>
  static Vector pack_across_depth(const T* data, int64_t ld, int depth, int count) {
    const __m512i first = widened(data, count);
    if (depth == 1) {
      return {_mm512_castsi512_ps(first)};
    }
    return {_mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(widened(data + ld, count), 16)))};
  }
  static Vector plus_product(Vector sum, Vector a, Vector b) {
    return {_mm512_dpbf16_ps(sum.value, (__m512bh)a.value, (__m512bh)b.value)};
  }

 private:
  /// `count` elements, each in the lower half of its lane.
  static __m512i widened(const c10::BFloat16* data, int count) {
    const auto lanes = static_cast<__mmask16>((1U << count) - 1);
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, data));
  }
  static __m512i widened(const float* data, int count) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load_partial(data, count).value));
  }
};

} // namespace
} // namespace blockdiag::cpu
