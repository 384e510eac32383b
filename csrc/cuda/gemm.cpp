#include "gemm.h"

#include "cublas.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/util/StringUtil.h>
#include <c10/util/env.h>

#include <algorithm>
#include <array>
#include <atomic>

namespace blockdiag::cuda {
namespace {

/// Adds to the handle's math mode, for as long as it lives, that half products are not to be reduced in half precision if
/// torch.backends.cuda.matmul.allow_{fp16,bf16}_reduced_precision_reduction says so.
class ReductionMode {
 public:
  ReductionMode(cublasHandle_t handle, cublasMath_t mode, c10::ScalarType dtype) : handle_(handle), mode_(mode) {
    using Option = at::CuBLASReductionOption;
    const auto option = reduction_option(dtype);
    TORCH_CHECK(
        option != Option::DisallowReducedPrecisionDisallowSplitK,
        "blockdiag: expected allow_splitk=True in "
        "torch.backends.cuda.matmul.allow_{fp16,bf16}_reduced_precision_reduction "
        "where cuBLAS computes, as it cannot be told not to split sums: cuBLASLt can, by "
        "blockdiag.preferred_cuda_gemm(\"cublaslt\"), but it has no algorithm for some problems"
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

/// 1 or 0 in every type that cuBLAS reads alpha and beta in: the compute type, real or complex.
struct Scalar {
  float as_float[2];
  double as_double[2];

  explicit Scalar(int value) : as_float{static_cast<float>(value), 0}, as_double{static_cast<double>(value), 0} {}

  const void* as(cublasComputeType_t compute) const {
    return compute == CUBLAS_COMPUTE_64F ? static_cast<const void*>(as_double) : as_float;
  }
};

} // namespace

void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate) {
  // ATen's handle: bound to the current stream, with a workspace from the caching allocator that graph capture knows of,
  // and in the math mode that torch.backends and torch.set_float32_matmul_precision ask for.
  const cublasHandle_t handle = at::cuda::getCurrentCUDABlasHandle();
  cublasMath_t mode = CUBLAS_DEFAULT_MATH;
  check_status(cublasGetMathMode(handle, &mode), "cublasGetMathMode", gemm, dtype);
  const ReductionMode reduction_mode(handle, mode, dtype);
  const auto [data, compute] = types_of(dtype, (mode & CUBLAS_TF32_TENSOR_OP_MATH) == CUBLAS_TF32_TENSOR_OP_MATH);

  const auto trans_a = gemm.a.transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
  const auto trans_b = gemm.b.transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
  // The check has made sure that every size and leading dimension fits 32 bits.
  const int m = static_cast<int>(gemm.m), n = static_cast<int>(gemm.n), k = static_cast<int>(gemm.k);
  const int lda = static_cast<int>(gemm.a.ld), ldb = static_cast<int>(gemm.b.ld), ldc = static_cast<int>(gemm.c.ld);
  const Scalar one(1), beta(accumulate ? 1 : 0);
  if (gemm.batch == 1) {
    // The batched function is slower here (pytorch#114911).
    check_status(
        cublasGemmEx(
            handle,
            trans_a,
            trans_b,
            m,
            n,
            k,
            one.as(compute),
            a,
            data,
            lda,
            b,
            data,
            ldb,
            beta.as(compute),
            c,
            data,
            ldc,
            compute,
            CUBLAS_GEMM_DEFAULT
        ),
        "cublasGemmEx",
        gemm,
        dtype
    );
    return;
  }
  // Batched kernels index blocks with a grid dimension that ends at 65535.
  constexpr int64_t kMaxBatch = 65535;
  const auto bytes = static_cast<int64_t>(c10::elementSize(dtype));
  for (int64_t start = 0; start < gemm.batch; start += kMaxBatch) {
    check_status(
        cublasGemmStridedBatchedEx(
            handle,
            trans_a,
            trans_b,
            m,
            n,
            k,
            one.as(compute),
            static_cast<const char*>(a) + start * gemm.a.stride * bytes,
            data,
            lda,
            gemm.a.stride,
            static_cast<const char*>(b) + start * gemm.b.stride * bytes,
            data,
            ldb,
            gemm.b.stride,
            beta.as(compute),
            static_cast<char*>(c) + start * gemm.c.stride * bytes,
            data,
            ldc,
            gemm.c.stride,
            static_cast<int>(std::min(kMaxBatch, gemm.batch - start)),
            compute,
            CUBLAS_GEMM_DEFAULT
        ),
        "cublasGemmStridedBatchedEx",
        gemm,
        dtype
    );
  }
}

namespace {

constexpr std::array kLibraryNames = {"cublas", "cublaslt", "small_blocks"}; // in the order of Library

Library library_named(const std::string& name, const char* what) {
  const auto found = std::find(kLibraryNames.begin(), kLibraryNames.end(), name);
  TORCH_CHECK_VALUE(
      found != kLibraryNames.end(),
      "blockdiag: expected ",
      what,
      " to be one of [",
      c10::Join(", ", kLibraryNames),
      "], but got \"",
      name,
      "\""
  );
  return static_cast<Library>(found - kLibraryNames.begin());
}

std::atomic<Library>& preferred() {
  static std::atomic<Library> library =
      library_named(c10::utils::get_env("BLOCKDIAG_CUDA_GEMM").value_or("cublas"), "BLOCKDIAG_CUDA_GEMM");
  return library;
}

} // namespace

Library preferred_library() {
  return preferred();
}

std::string preferred_gemm(const std::optional<std::string>& name) {
  if (name) {
    preferred() = library_named(*name, "the name of a library");
  }
  return kLibraryNames[static_cast<size_t>(preferred_library())];
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
