#include "check.h"

#include "problem/gemm.h"
#include "scalar_type.h"

#include <c10/util/Exception.h>

namespace blockdiag {

void check_dtypes_and_devices(
    const char* op, std::initializer_list<NamedTensor> tensors, std::optional<at::ScalarType> out_dtype
) {
  const auto name_of = [](at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; };
  const auto check_supported = [&](const char* name, at::ScalarType dtype) {
    TORCH_CHECK(
        find_dtype(dtype), op, ": expected ", name,
        " to be float16, bfloat16, float32, float64, complex64 or complex128, but got ", name_of(dtype)
    );
  };
  const auto& [first_name, first] = *tensors.begin();
  if (out_dtype) {
    check_supported("out_dtype", *out_dtype);
  }
  auto half = out_dtype; // the one half type beside float32, once there is one
  for (const auto& [name, tensor] : tensors) {
    const auto dtype = tensor->scalar_type();
    check_supported(name, dtype);
    if (!out_dtype) {
      TORCH_CHECK(
          dtype == first->scalar_type(), op, ": expected ", name, " to have ", first_name, "'s dtype ",
          name_of(first->scalar_type()), ", but got ", name_of(dtype)
      );
    } else if (half == at::kFloat && at::isReducedFloatingType(dtype)) {
      half = dtype;
    } else {
      const bool mixes = *half == at::kFloat || at::isReducedFloatingType(*half);
      TORCH_CHECK(
          dtype == *half || (mixes && dtype == at::kFloat), op, ": expected ", name, " to be ",
          mixes && half != at::kFloat ? "float32 or " : "", name_of(*half), ", as out_dtype is ", name_of(*out_dtype),
          half == out_dtype ? "" : " and another tensor is of that half type", ", but got ", name_of(dtype)
      );
    }
    TORCH_CHECK(
        tensor->device() == first->device(), op, ": expected ", name, " to be on ", first_name, "'s device ",
        first->device(), ", but got ", tensor->device()
    );
  }
}

void check_fits_blas(const char* op, const char* what, const c10::SymInt& size) {
  if (const auto value = size.maybe_as_int()) {
    TORCH_CHECK(
        *value <= kBlasMax, op, ": expected ", what, " to fit BLAS's 32-bit integers (", kBlasMax, "), but got ", *value
    );
  }
}

DType dtype_of(const at::Tensor& tensor) { return find_dtype(tensor.scalar_type()).value(); }

} // namespace blockdiag
