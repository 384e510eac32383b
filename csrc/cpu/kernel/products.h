// How the kernel multiplies elements of one type: what it keeps them as, and the one instruction of its innermost loop.
//
// The innermost loop works on 32-bit packed elements. Such an element is one float, or two bfloat16 that are neighbours
// along the depth where the CPU multiplies and adds such pairs.
//
// For files that have chosen an instruction set; see headers.h.
#pragma once

#include "vector.h"

namespace blockdiag::cpu {
namespace {

/// float32 arithmetic: half types are converted when they are packed.
template <typename T>
struct Products {
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

#if defined(BLOCKDIAG_AVX512_BF16)

/// Pairs of bfloat16, their products added in float32. The instruction takes subnormal numbers for zeros, in its operands and
/// in its sums.
template <>
struct Products<c10::BFloat16> {
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

#endif

} // namespace
} // namespace blockdiag::cpu
