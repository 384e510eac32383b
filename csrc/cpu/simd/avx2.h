// A vector of floats for AVX2 (with FMA and F16C): only what the microkernels need.
#pragma once

#include "cpu/isa/headers.h"

namespace blockdiag::cpu {
namespace {

struct Vector {
  static constexpr int kLanes = 8;
  __m256 value;

  static Vector zero() { return {_mm256_setzero_ps()}; }
  static Vector broadcast(float scalar) { return {_mm256_set1_ps(scalar)}; }
  /// kCount floats, over and over.
  template <int kCount>
  static Vector repeat(const float* data) {
    if constexpr (kCount == 1) {
      return broadcast(*data);
    } else if constexpr (kCount == 4) {
      const __m128 some = _mm_loadu_ps(data);
      return {_mm256_set_m128(some, some)};
    } else {
      static_assert(kCount == kLanes);
      return load(data);
    }
  }
  static Vector load(const float* data) { return {_mm256_loadu_ps(data)}; }
  static Vector load(const c10::Half* data) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)))};
  }
  static Vector load(const c10::BFloat16* data) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static void store(Vector vector, float* data) { _mm256_storeu_ps(data, vector.value); }
  static void store(Vector vector, c10::Half* data) {
    const __m128i bits = _mm256_cvtps_ph(vector.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), bits);
  }
  static void store(Vector vector, c10::BFloat16* data) {
    // Rounds to nearest, ties to even. A NaN becomes one fixed NaN, as rounding could carry it into infinity.
    const __m256i bits = _mm256_castps_si256(vector.value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(vector.value, vector.value, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), packed);
  }
  Vector operator+(Vector other) const { return {_mm256_add_ps(value, other.value)}; }
  /// this + a * b
  Vector plus_product(Vector a, Vector b) const { return {_mm256_fmadd_ps(a.value, b.value, value)}; }
  static Vector load_masked(const float* data, int count) { return {_mm256_maskload_ps(data, first_lanes(count))}; }
  template <typename T>
  static Vector load_masked(const T* data, int count) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, data, static_cast<size_t>(count) * sizeof(T));
    return load(lanes);
  }
  static void store_masked(Vector vector, float* data, int count) {
    _mm256_maskstore_ps(data, first_lanes(count), vector.value);
  }
  template <typename T>
  static void store_masked(Vector vector, T* data, int count) {
    T lanes[kLanes];
    store(vector, lanes);
    std::memcpy(data, lanes, static_cast<size_t>(count) * sizeof(T));
  }

 private:
  static __m256i first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
};

} // namespace
} // namespace blockdiag::cpu
