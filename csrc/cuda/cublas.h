// Shared by cuBLAS and cuBLASLt: types, and errors that name the status and the problem.
#pragma once

#include "problem/gemm.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <cublas_v2.h>

namespace blockdiag::cuda {

/// A dtype in cuBLAS's terms. Half types accumulate in float32.
struct Types {
  cudaDataType_t data;
  cublasComputeType_t compute;
};

inline Types types_of(DType dtype, bool tf32) {
  const auto compute_float = tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
  switch (dtype) {
    case DType::kFloat16:
      return {CUDA_R_16F, CUBLAS_COMPUTE_32F};
    case DType::kBFloat16:
      return {CUDA_R_16BF, CUBLAS_COMPUTE_32F};
    case DType::kFloat32:
      return {CUDA_R_32F, compute_float};
    case DType::kFloat64:
      return {CUDA_R_64F, CUBLAS_COMPUTE_64F};
    case DType::kComplex64:
      return {CUDA_C_32F, compute_float};
    default:
      return {CUDA_C_64F, CUBLAS_COMPUTE_64F};
  }
}

/// The dtype of C, which may be float32 beside operands of a half type.
inline DType dtype_of_c(const GemmProblem& problem) { return problem.float32.c ? DType::kFloat32 : problem.dtype; }

/// Whether cuBLAS multiplies the operands as they are.
inline bool operands_are_of_one_type(const Float32& float32) { return !float32.a && !float32.b && !float32.bias; }

/// The allowed reductions of a dtype's products:
/// torch.backends.cuda.matmul.allow_{fp16,bf16}_reduced_precision_reduction.
inline at::CuBLASReductionOption reduction_option(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return at::globalContext().allowFP16ReductionCuBLAS();
    case DType::kBFloat16:
      return at::globalContext().allowBF16ReductionCuBLAS();
    default:
      return at::CuBLASReductionOption::AllowReducedPrecisionWithSplitK;
  }
}

inline void check_status(cublasStatus_t status, const char* function, const GemmProblem& problem) {
  const auto& gemm = problem.gemm;
  TORCH_CHECK(
      status == CUBLAS_STATUS_SUCCESS, "blockdiag: ", function, " returned ", cublasGetStatusName(status), " for a ",
      name_of(problem.dtype), " GEMM of m = ", gemm.m, ", n = ", gemm.n, ", k = ", gemm.k, ", batch = ", gemm.batch,
      ", lda = ", gemm.a.ld, ", ldb = ", gemm.b.ld, ", ldc = ", gemm.c.ld
  );
}

} // namespace blockdiag::cuda
