// What both ways to call cuBLAS share: types, and errors that name the status and the problem.
#pragma once

#include "../gemm.h"

#include <ATen/Context.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <cublas_v2.h>

namespace blockdiag::cuda {

/// How cuBLAS is told of a dtype: half types are accumulated in float32.
struct Types {
  cudaDataType_t data;
  cublasComputeType_t compute;
};

inline Types types_of(c10::ScalarType dtype, bool tf32) {
  const auto compute_float = tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  switch (dtype) {
    case c10::kHalf:
      return {CUDA_R_16F, CUBLAS_COMPUTE_32F};
    case c10::kBFloat16:
      return {CUDA_R_16BF, CUBLAS_COMPUTE_32F};
    case c10::kFloat:
      return {CUDA_R_32F, compute_float};
    case c10::kDouble:
      return {CUDA_R_64F, CUBLAS_COMPUTE_64F};
    case c10::kComplexFloat:
      return {CUDA_C_32F, compute_float};
    case c10::kComplexDouble:
      return {CUDA_C_64F, CUBLAS_COMPUTE_64F};
    default:
      TORCH_INTERNAL_ASSERT(false, "the check lets no other dtype pass");
  }
}

/// How a dtype's products may be reduced: torch.backends.cuda.matmul.allow_{fp16,bf16}_reduced_precision_reduction.
inline at::CuBLASReductionOption reduction_option(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kHalf:
      return at::globalContext().allowFP16ReductionCuBLAS();
    case c10::kBFloat16:
      return at::globalContext().allowBF16ReductionCuBLAS();
    default:
      return at::CuBLASReductionOption::AllowReducedPrecisionWithSplitK;
  }
}

inline void check_status(cublasStatus_t status, const char* function, const Gemm& gemm, c10::ScalarType dtype) {
  TORCH_CHECK(
      status == CUBLAS_STATUS_SUCCESS,
      "blockdiag: ",
      function,
      " returned ",
      cublasGetStatusName(status),
      " for a ",
      c10::getDtypeNames(dtype).first,
      " GEMM of m = ",
      gemm.m,
      ", n = ",
      gemm.n,
      ", k = ",
      gemm.k,
      ", batch = ",
      gemm.batch,
      ", lda = ",
      gemm.a.ld,
      ", ldb = ",
      gemm.b.ld,
      ", ldc = ",
      gemm.c.ld
  );
}

} // namespace blockdiag::cuda
