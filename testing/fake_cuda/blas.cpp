// cuBLAS: the handle, and the two functions that this project calls.
#include "fake.h"

#include <string>

namespace fake {
namespace {

constexpr uint64_t kMagic = 0xfa4eb1a5;

/// The type of alpha and beta, if cuBLAS supports `data` in `compute`.
bool scale_of(cudaDataType data, cublasComputeType_t compute, cudaDataType* scale) {
  const bool single = compute == CUBLAS_COMPUTE_32F;
  const bool tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32;
  switch (data) {
    case CUDA_R_16F:
    case CUDA_R_16BF:
      *scale = CUDA_R_32F;
      return single;
    case CUDA_R_32F:
    case CUDA_C_32F:
      *scale = data;
      return single || tf32;
    case CUDA_R_64F:
    case CUDA_C_64F:
      *scale = data;
      return compute == CUBLAS_COMPUTE_64F;
    default:
      return false;
  }
}

cublasStatus_t gemm(cublasHandle_t handle, Product product, cublasComputeType_t compute) {
  if (do_nothing) {
    return CUBLAS_STATUS_SUCCESS;
  }
  auto& found = handle_of(handle);
  log(std::string(product.function) + " m=" + std::to_string(product.m) + " n=" + std::to_string(product.n) +
      " k=" + std::to_string(product.k) + " batch=" + std::to_string(product.batch));
  if (const auto status = option("gemm_status")) {
    return static_cast<cublasStatus_t>(status);
  }
  if (!is_consistent(product)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (!scale_of(product.a.type, compute, &product.scale) || product.batch > 65535) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (found.pointers != CUBLAS_POINTER_MODE_HOST) {
    fail("alpha and beta on the device are not faked");
  }
  auto& stream = stream_of(found.stream);
  if (found.device != current_device() || stream.device != found.device) {
    fail(std::string(product.function) + ": the handle, its stream and the current device are not of one device");
  }
  product.tf32 = compute == CUBLAS_COMPUTE_32F_FAST_TF32 || (found.math & CUBLAS_TF32_TENSOR_OP_MATH) != 0;
  run(product, stream, 10);
  return CUBLAS_STATUS_SUCCESS;
}

/// A matrix as stored; its op() is rows x cols.
Matrix stored(
    const void* data, cudaDataType type, cublasOperation_t op, int64_t rows, int64_t cols, int64_t ld, int64_t stride
) {
  return op == CUBLAS_OP_N ? Matrix{data, type, rows, cols, ld, stride} : Matrix{data, type, cols, rows, ld, stride};
}

} // namespace

Handle& handle_of(const void* handle) {
  auto* found = static_cast<Handle*>(const_cast<void*>(handle));
  if (found == nullptr || found->magic != kMagic) {
    fail("a handle that no fake function made");
  }
  return *found;
}

} // namespace fake

using namespace fake;

FAKE_EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  *handle = reinterpret_cast<cublasHandle_t>(
      new Handle{kMagic, current_device(), nullptr, CUBLAS_DEFAULT_MATH, CUBLAS_POINTER_MODE_HOST}
  );
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  delete &handle_of(handle);
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  handle_of(handle).stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t size) {
  const auto begin = reinterpret_cast<uintptr_t>(workspace);
  if (begin % 256 != 0) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  if (size > 0) {
    check_range("cublasSetWorkspace", begin, begin + size, handle_of(handle).device);
  }
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  handle_of(handle).math = mode;
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t* mode) {
  *mode = handle_of(handle).math;
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  handle_of(handle).pointers = mode;
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t* mode) {
  *mode = handle_of(handle).pointers;
  return CUBLAS_STATUS_SUCCESS;
}

FAKE_EXPORT cublasStatus_t cublasGemmEx(
    cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k, const void* alpha,
    const void* a, cudaDataType type_a, int lda, const void* b, cudaDataType type_b, int ldb, const void* beta, void* c,
    cudaDataType type_c, int ldc, cublasComputeType_t compute, cublasGemmAlgo_t
) {
  const Matrix result = stored(c, type_c, CUBLAS_OP_N, m, n, ldc, 0);
  const Matrix left = stored(a, type_a, op_a, m, k, lda, 0), right = stored(b, type_b, op_b, k, n, ldb, 0);
  return gemm(handle, {"cublasGemmEx", m, n, k, 1, op_a, op_b, left, right, result, result, alpha, beta, {}}, compute);
}

FAKE_EXPORT cublasStatus_t cublasGemmStridedBatchedEx(
    cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n, int k, const void* alpha,
    const void* a, cudaDataType type_a, int lda, long long stride_a, const void* b, cudaDataType type_b, int ldb,
    long long stride_b, const void* beta, void* c, cudaDataType type_c, int ldc, long long stride_c, int batch,
    cublasComputeType_t compute, cublasGemmAlgo_t
) {
  const Matrix result = stored(c, type_c, CUBLAS_OP_N, m, n, ldc, stride_c);
  const Matrix left = stored(a, type_a, op_a, m, k, lda, stride_a);
  const Matrix right = stored(b, type_b, op_b, k, n, ldb, stride_b);
  const char* name = "cublasGemmStridedBatchedEx";
  return gemm(handle, {name, m, n, k, batch, op_a, op_b, left, right, result, result, alpha, beta, {}}, compute);
}
