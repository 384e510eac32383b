// A vector of floats for AVX-512 (F, BW, DQ, VL): only what the microkernels need.
#pragma once

#include "cpu/isa/headers.h"

namespace blockdiag::cpu {
namespace {

struct Vector {
  static constexpr int kLanes = 16;
  __m512 value;

  static Vector zero() { return {_mm512_setzero_ps()}; }
  static Vector broadcast(float scalar) { return {_mm512_set1_ps(scalar)}; }
  /// kCount floats, over and over.
  template <int kCount>
  static Vector repeat(const float* data) {
    if constexpr (kCount == 1) {
      return broadcast(*data);
    } else if constexpr (kCount == 4) {
      return {_mm512_broadcast_f32x4(_mm_loadu_ps(data))};
    } else if constexpr (kCount == 8) {
      return {_mm512_broadcast_f32x8(_mm256_loadu_ps(data))};
    } else {
      static_assert(kCount == kLanes);
      return load(data);
    }
  }
  static Vector load(const float* data) { return {_mm512_loadu_ps(data)}; }
  static Vector load(const c10::Half* data) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)))};
  }
  static Vector load(const c10::BFloat16* data) {
    return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  }
  static void store(Vector vector, float* data) { _mm512_storeu_ps(data, vector.value); }
  static void store(Vector vector, c10::Half* data) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), to_half(vector));
  }
  static void store(Vector vector, c10::BFloat16* data) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), to_bfloat16(vector));
  }
  Vector operator+(Vector other) const { return {_mm512_add_ps(value, other.value)}; }
  /// this + a * b
  Vector plus_product(Vector a, Vector b) const { return {_mm512_fmadd_ps(a.value, b.value, value)}; }
  static Vector load_masked(const float* data, int count) { return {_mm512_maskz_loadu_ps(first_lanes(count), data)}; }
  static Vector load_masked(const c10::Half* data, int count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), data))};
  }
  static Vector load_masked(const c10::BFloat16* data, int count) {
    return from_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(count), data));
  }
  static void store_masked(Vector vector, float* data, int count) {
    _mm512_mask_storeu_ps(data, first_lanes(count), vector.value);
  }
  static void store_masked(Vector vector, c10::Half* data, int count) {
    _mm256_mask_storeu_epi16(data, first_lanes(count), to_half(vector));
  }
  static void store_masked(Vector vector, c10::BFloat16* data, int count) {
    _mm256_mask_storeu_epi16(data, first_lanes(count), to_bfloat16(vector));
  }

 private:
  static __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1U << count) - 1); }
  static Vector from_bfloat16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static __m256i to_half(Vector vector) {
    return _mm512_maskz_cvtps_ph(0xffff, vector.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  /// Rounds to nearest, ties to even. A NaN becomes one fixed NaN, as rounding could carry it into infinity.
  static __m256i to_bfloat16(Vector vector) {
    const __m512i bits = _mm512_castps_si512(vector.value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(vector.value, vector.value, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(high);
  }
};

} // namespace
} // namespace blockdiag::cpu
