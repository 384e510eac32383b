#include "check.h"

#include "problem/gemm.h"
#include "scalar_type.h"

#include <c10/util/Exception.h>

namespace blockdiag {

void check_dtypes_and_devices(const char* op, std::initializer_list<NamedTensor> tensors) {
  const auto name_of = [](const at::Tensor& tensor) { return c10::getDtypeNames(tensor.scalar_type()).first; };
  const auto& [first_name, first] = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(
        find_dtype(tensor->scalar_type()), op, ": expected ", name,
        " to be float16, bfloat16, float32, float64, complex64 or complex128, but got ", name_of(*tensor)
    );
    TORCH_CHECK(
        tensor->scalar_type() == first->scalar_type(), op, ": expected ", name, " to have ", first_name, "'s dtype ",
        name_of(*first), ", but got ", name_of(*tensor)
    );
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
