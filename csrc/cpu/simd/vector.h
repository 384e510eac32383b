// Operations on vectors of any width. Include after the instruction set's own header, which defines Vector.
#pragma once

#include "cpu/isa/headers.h"

namespace blockdiag::cpu {
namespace {

/// Loads the first `count` lanes, without reading past them; the others are zero.
template <typename T>
Vector load_partial(const T* data, int count) {
  return count == Vector::kLanes ? Vector::load(data) : Vector::load_masked(data, count);
}

/// Stores the first `count` lanes, without writing past them.
template <typename T>
void store_partial(Vector vector, T* data, int count) {
  count == Vector::kLanes ? Vector::store(vector, data) : Vector::store_masked(vector, data, count);
}

// The functions on arrays of vectors are always inlined, so that the arrays stay in registers.

/// Exchanges the off-diagonal quarters of each square of 2 * kWidth in two matrix rows that are kWidth apart.
template <int kWidth, int... kLane>
[[gnu::always_inline]] inline void
exchange(Vector& upper, Vector& lower, std::integer_sequence<int, kLane...> /*lanes*/) {
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
[[gnu::always_inline]] inline void transpose(Vector* rows) {
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

/// The sum of each of kLanes vectors, in its lane of the result: adds up the rows of their transpose, each pair as soon
/// as possible. Overwrites the vectors.
template <int kWidth = 1>
[[gnu::always_inline]] inline Vector sum_each(Vector* rows) {
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
