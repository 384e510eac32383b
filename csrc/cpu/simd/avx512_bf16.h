// Native bfloat16 products with AVX-512 BF16.
#pragma once

#include "cpu/microkernels/element.h"

namespace blockdiag::cpu {
namespace {

/// Pairs of bfloat16, whose products are added in float32. The instruction flushes subnormal operands and sums to zero.
template <>
struct Element<c10::BFloat16> {
  static constexpr int kDepth = 2;
  static constexpr bool kReadInPlace = true;

  static Vector pack_along_depth(const c10::BFloat16* data, int count) {
    const auto lanes = static_cast<__mmask32>((uint64_t{1} << count) - 1);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(lanes, data))};
  }
  static Vector pack_across_depth(const c10::BFloat16* data, int64_t ld, int depth, int count) {
    const auto lanes = static_cast<__mmask16>((1U << count) - 1);
    const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, data));
    if (depth == 1) {
      return {_mm512_castsi512_ps(first)};
    }
    const __m512i second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, data + ld));
    return {_mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)))};
  }
  static Vector plus_product(Vector sum, Vector a, Vector b) {
    return {_mm512_dpbf16_ps(sum.value, (__m512bh)a.value, (__m512bh)b.value)};
  }
};

} // namespace
} // namespace blockdiag::cpu
