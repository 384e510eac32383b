// Conversion from and to torch's dtypes.
#pragma once

#include "problem/dtype.h"

#include <c10/core/ScalarType.h>

#include <optional>

namespace blockdiag {

constexpr c10::ScalarType kScalarTypes[] = {
    c10::kHalf, c10::kBFloat16, c10::kFloat, c10::kDouble, c10::kComplexFloat, c10::kComplexDouble,
}; // in the order of DType

constexpr c10::ScalarType scalar_type_of(DType dtype) { return kScalarTypes[static_cast<int>(dtype)]; }

/// Nothing if no op supports it.
constexpr std::optional<DType> find_dtype(c10::ScalarType type) {
  for (const auto dtype :
       {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64, DType::kComplex64, DType::kComplex128}) {
    if (scalar_type_of(dtype) == type) {
      return dtype;
    }
  }
  return std::nullopt;
}

} // namespace blockdiag
