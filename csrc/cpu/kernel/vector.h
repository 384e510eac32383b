// One vector of floats, as wide as the instruction set of the file that includes this: the little of it that kernel.h needs.
//
// For files that have chosen an instruction set; see headers.h.
#pragma once

namespace blockdiag::cpu {
namespace {

#if defined(BLOCKDIAG_AVX512)

struct Vector {
  static constexpr int kLanes = 16;
  static constexpr int kMaxRows = 14; // of two vectors of sums each, beside what else needs a register
  __m512 value;

  static Vector zero() {
    return {_mm512_setzero_ps()};
  }
  static Vector broadcast(float scalar) {
    return {_mm512_set1_ps(scalar)};
  }
  static Vector load(const float* data) {
    return {_mm512_loadu_ps(data)};
  }
  static Vector load(const c10::Half* data) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)))};
  }
  static Vector load(const c10::BFloat16* data) {
    return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
  }
  static void store(Vector vector, float* data) {
    _mm512_storeu_ps(data, vector.value);
  }
  static void store(Vector vector, c10::Half* data) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), to_half(vector));
  }
  static void store(Vector vector, c10::BFloat16* data) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(data), to_bfloat16(vector));
  }
  Vector operator+(Vector other) const {
    return {_mm512_add_ps(value, other.value)};
  }
  /// this + a * b
  Vector plus_product(Vector a, Vector b) const {
    return {_mm512_fmadd_ps(a.value, b.value, value)};
  }
  static Vector load_masked(const float* data, int count) {
    return {_mm512_maskz_loadu_ps(first_lanes(count), data)};
  }
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
  static __mmask16 first_lanes(int count) {
    return static_cast<__mmask16>((1U << count) - 1);
  }
  static Vector from_bfloat16(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static __m256i to_half(Vector vector) {
    return _mm512_maskz_cvtps_ph(0xffff, vector.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  /// To nearest, ties to even; a NaN, which that could carry into infinity, as one fixed NaN.
  static __m256i to_bfloat16(Vector vector) {
    const __m512i bits = _mm512_castps_si512(vector.value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(vector.value, vector.value, _CMP_UNORD_Q);
    const __m512i high = _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fc0));
    return _mm512_cvtepi32_epi16(high);
  }
};

#else

struct Vector {
  static constexpr int kLanes = 8;
  static constexpr int kMaxRows = 6; // of two vectors of sums each, beside what else needs a register
  __m256 value;

  static Vector zero() {
    return {_mm256_setzero_ps()};
  }
  static Vector broadcast(float scalar) {
    return {_mm256_set1_ps(scalar)};
  }
  static Vector load(const float* data) {
    return {_mm256_loadu_ps(data)};
  }
  static Vector load(const c10::Half* data) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)))};
  }
  static Vector load(const c10::BFloat16* data) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }
  static void store(Vector vector, float* data) {
    _mm256_storeu_ps(data, vector.value);
  }
  static void store(Vector vector, c10::Half* data) {
    const __m128i bits = _mm256_cvtps_ph(vector.value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), bits);
  }
  static void store(Vector vector, c10::BFloat16* data) {
    // To nearest, ties to even; a NaN, which that could carry into infinity, as one fixed NaN.
    const __m256i bits = _mm256_castps_si256(vector.value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(vector.value, vector.value, _CMP_UNORD_Q));
    const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(data), packed);
  }
  Vector operator+(Vector other) const {
    return {_mm256_add_ps(value, other.value)};
  }
  /// this + a * b
  Vector plus_product(Vector a, Vector b) const {
    return {_mm256_fmadd_ps(a.value, b.value, value)};
  }
  static Vector load_masked(const float* data, int count) {
    return {_mm256_maskload_ps(data, first_lanes(count))};
  }
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

#endif

/// The first `count` lanes from memory, which holds no more, and zeros.
template <typename T>
Vector load_partial(const T* data, int count) {
  return count == Vector::kLanes ? Vector::load(data) : Vector::load_masked(data, count);
}

/// The first `count` lanes to memory, which has room for no more.
template <typename T>
void store_partial(Vector vector, T* data, int count) {
  count == Vector::kLanes ? Vector::store(vector, data) : Vector::store_masked(vector, data, count);
}

/// Of two rows of a matrix at distance kWidth, exchanges the off-diagonal quarters of each square of 2 * kWidth.
template <int kWidth, int... kLane>
void exchange(Vector& upper, Vector& lower, std::integer_sequence<int, kLane...> /*lanes*/) {
  using Floats = float __attribute__((vector_size(sizeof(Vector))));
  using Ints = int __attribute__((vector_size(sizeof(Vector))));
  constexpr Ints kUpper = {((kLane & kWidth) != 0 ? Vector::kLanes + kLane - kWidth : kLane)...};
  constexpr Ints kLower = {((kLane & kWidth) != 0 ? Vector::kLanes + kLane : kLane + kWidth)...};
  const auto first = (Floats)upper.value, second = (Floats)lower.value;
  upper.value = (decltype(Vector::value))__builtin_shuffle(first, second, kUpper);
  lower.value = (decltype(Vector::value))__builtin_shuffle(first, second, kLower);
}

/// Transposes kLanes vectors.
template <int kWidth = 1>
void transpose(Vector* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < Vector::kLanes; ++i) {
    if ((i & kWidth) == 0) {
      exchange<kWidth>(rows[i], rows[i + kWidth], std::make_integer_sequence<int, Vector::kLanes>());
    }
  }
  if constexpr (2 * kWidth < Vector::kLanes) {
    transpose<2 * kWidth>(rows);
  }
}

/// The sum of each of kLanes vectors, in its lane of the result: what adding up the rows of their transpose gives, adding as
/// soon as two can be added. Overwrites the vectors.
template <int kWidth = 1>
Vector sum_each(Vector* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < Vector::kLanes; i += 2 * kWidth) {
    exchange<kWidth>(rows[i], rows[i + kWidth], std::make_integer_sequence<int, Vector::kLanes>());
    rows[i] = rows[i] + rows[i + kWidth];
  }
  if constexpr (2 * kWidth < Vector::kLanes) {
    return sum_each<2 * kWidth>(rows);
  } else {
    return rows[0];
  }
}

} // namespace
} // namespace blockdiag::cpu
