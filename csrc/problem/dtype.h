// The element types of problems.
#pragma once

#include <cstdint>

namespace blockdiag {

enum class DType : uint8_t { kFloat16, kBFloat16, kFloat32, kFloat64, kComplex64, kComplex128 };

/// Bytes of an element.
constexpr int64_t size_of(DType dtype) {
  constexpr int64_t kSizes[] = {2, 2, 4, 8, 8, 16};
  return kSizes[static_cast<int>(dtype)];
}

/// The name in Python.
constexpr const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64", "complex64", "complex128"};
  return kNames[static_cast<int>(dtype)];
}

constexpr bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

} // namespace blockdiag
