// Shared by the checks of all ops: dtypes, devices, and sizes that BLAS can address.
#pragma once

#include "problem/dtype.h"

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <initializer_list>
#include <optional>
#include <utility>

namespace blockdiag {

using NamedTensor = std::pair<const char*, const at::Tensor*>;

/// Checks that all tensors have one device and one supported dtype. With an `out_dtype`, that each is float32 or of one
/// half type, as `out_dtype` is; or that all have `out_dtype`.
void check_dtypes_and_devices(
    const char* op, std::initializer_list<NamedTensor> tensors, std::optional<at::ScalarType> out_dtype = std::nullopt
);

/// Checks that a size fits BLAS's 32-bit integers. Symbolic sizes pass: they are checked when the traced program runs.
void check_fits_blas(const char* op, const char* what, const c10::SymInt& size);

/// The dtype of a tensor that has passed the check.
DType dtype_of(const at::Tensor& tensor);

} // namespace blockdiag
