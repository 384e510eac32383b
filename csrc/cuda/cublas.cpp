// cuBLAS's strided batched GEMM: the fallback for every dtype.
#include "cublas.h"

#include "backend.h"
#include "scalar_type.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDAFunctions.h>

#include <algorithm>

namespace blockdiag::cuda {
namespace {

/// While alive, disallows reductions in half precision in the handle's math mode if
/// torch.backends.cuda.matmul.allow_{fp16,bf16}_reduced_precision_reduction says so.
class ReductionMode {
 public:
  ReductionMode(cublasHandle_t handle, cublasMath_t mode, DType dtype) : handle_(handle), mode_(mode) {
    using Option = at::CuBLASReductionOption;
    const auto option = reduction_option(dtype);
    TORCH_CHECK(
        option != Option::DisallowReducedPrecisionDisallowSplitK,
        "blockdiag: expected allow_splitk=True in "
        "torch.backends.cuda.matmul.allow_{fp16,bf16}_reduced_precision_reduction "
        "where cuBLAS computes, as it cannot be told not to split sums: cuBLASLt can, by "
        "blockdiag.backends.cuda.preferred_blas_library(\"cublaslt\"), but it has no algorithm for some problems"
    );
    disallow_ = option != Option::AllowReducedPrecisionWithSplitK;
    if (disallow_) {
      cublasSetMathMode(handle_, static_cast<cublasMath_t>(mode_ | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
    }
  }
  ReductionMode(const ReductionMode&) = delete;
  ReductionMode& operator=(const ReductionMode&) = delete;
  ~ReductionMode() {
    if (disallow_) {
      cublasSetMathMode(handle_, mode_);
    }
  }

 private:
  cublasHandle_t handle_;
  cublasMath_t mode_;
  bool disallow_;
};

/// 1 or 0 in every type of alpha and beta: the compute type, real or complex. Aligned as CUDA's complex types: cuBLAS's
/// code for vectors loads them at once.
struct Scalar {
  alignas(8) float as_float[2];
  alignas(16) double as_double[2];

  explicit Scalar(int value) : as_float{static_cast<float>(value), 0}, as_double{static_cast<double>(value), 0} {}

  const void* as(cublasComputeType_t compute) const {
    return compute == CUBLAS_COMPUTE_64F ? static_cast<const void*>(as_double) : as_float;
  }
};

/// Writes the bias to each column of C, before the product is added: no second pass over the result. Some kernels of
/// cuBLAS round a product of half types before they add it, as they do for torch.baddbmm.
void write_bias(const GemmProblem& problem, const Operands& operands) {
  const auto& [m, n, k, batch, a, b, c] = problem.gemm;
  const at::Device device(at::kCUDA, c10::cuda::current_device());
  const auto tensor = [&](const void* data, DType dtype, at::IntArrayRef sizes, at::IntArrayRef strides) {
    return at::for_blob(const_cast<void*>(data), sizes)
        .strides(strides)
        .options(at::device(device).dtype(scalar_type_of(dtype)))
        .target_device(device) // saves a query of the pointer's device
        .make_tensor();
  };
  tensor(operands.c, dtype_of_c(problem), {n, batch, m}, {c.ld, c.stride, 1})
      .copy_(tensor(operands.bias, problem.dtype, {batch, m}, {m, 1}));
}

} // namespace

bool cublas_takes(const GemmProblem& problem) {
  return !problem.epilogue.bias_grad && operands_are_of_one_type(problem.float32) && (!problem.float32.c || fuses());
}

bool cublas_run(const GemmProblem& problem, const Operands& operands) {
  const auto& gemm = problem.gemm;
  if (problem.epilogue.bias) {
    write_bias(problem, operands);
  }
  // ATen's handle is bound to the current stream, has a workspace from the caching allocator, which supports graph
  // capture, and the math mode that torch.backends and torch.set_float32_matmul_precision ask for.
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  cublasMath_t mode = CUBLAS_DEFAULT_MATH;
  check_status(cublasGetMathMode(handle, &mode), "cublasGetMathMode", problem);
  const ReductionMode reduction_mode(handle, mode, problem.dtype);
  const bool tf32 = (mode & CUBLAS_TF32_TENSOR_OP_MATH) == CUBLAS_TF32_TENSOR_OP_MATH;
  const auto [data, compute] = types_of(problem.dtype, tf32);
  const auto data_c = types_of(dtype_of_c(problem), tf32).data;

  const auto trans_a = gemm.a.transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
  const auto trans_b = gemm.b.transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
  // The check guarantees that every size and leading dimension fits 32 bits.
  const int m = static_cast<int>(gemm.m), n = static_cast<int>(gemm.n), k = static_cast<int>(gemm.k);
  const int lda = static_cast<int>(gemm.a.ld), ldb = static_cast<int>(gemm.b.ld), ldc = static_cast<int>(gemm.c.ld);
  const Scalar one(1), beta(problem.epilogue.bias || problem.epilogue.accumulate ? 1 : 0);
  if (gemm.batch == 1) {
    // The batched function is slower here (pytorch#114911).
    const auto status = cublasGemmEx(
        handle, trans_a, trans_b, m, n, k, one.as(compute), operands.a, data, lda, operands.b, data, ldb,
        beta.as(compute), operands.c, data_c, ldc, compute, CUBLAS_GEMM_DEFAULT
    );
    check_status(status, "cublasGemmEx", problem);
    return true;
  }
  // Batched kernels index blocks with a grid dimension of at most 65535.
  constexpr int64_t kMaxBatch = 65535;
  const int64_t bytes = size_of(problem.dtype), bytes_c = size_of(dtype_of_c(problem));
  for (int64_t start = 0; start < gemm.batch; start += kMaxBatch) {
    const auto status = cublasGemmStridedBatchedEx(
        handle, trans_a, trans_b, m, n, k, one.as(compute),
        static_cast<const char*>(operands.a) + start * gemm.a.stride * bytes, data, lda, gemm.a.stride,
        static_cast<const char*>(operands.b) + start * gemm.b.stride * bytes, data, ldb, gemm.b.stride,
        beta.as(compute), static_cast<char*>(operands.c) + start * gemm.c.stride * bytes_c, data_c, ldc, gemm.c.stride,
        static_cast<int>(std::min(kMaxBatch, gemm.batch - start)), compute, CUBLAS_GEMM_DEFAULT
    );
    check_status(status, "cublasGemmStridedBatchedEx", problem);
  }
  return true;
}

std::string cublas_versions() {
  const auto found = [](libraryPropertyType property) {
    int value = 0;
    return cublasGetProperty(property, &value) == CUBLAS_STATUS_SUCCESS ? std::to_string(value) : "?";
  };
  return "built with " + std::to_string(CUBLAS_VER_MAJOR) + "." + std::to_string(CUBLAS_VER_MINOR) + "." +
         std::to_string(CUBLAS_VER_PATCH) + ", found " + found(MAJOR_VERSION) + "." + found(MINOR_VERSION) + "." +
         found(PATCH_LEVEL);
}

} // namespace blockdiag::cuda
