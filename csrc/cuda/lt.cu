// The GEMM with its bias in one kernel, by cuBLASLt. Not run on a GPU yet, and therefore used only if asked for.
#include "cublas.h"
#include "gemm.h"
#include "plan.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

#include <cublasLt.h>

#include <optional>

namespace blockdiag::cuda {
namespace {

/// Descriptors, by value, and the algorithm that the heuristic recommends; none if it knows none.
struct Plan {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, c;
  std::optional<cublasLtMatmulAlgo_t> algorithm;
  size_t workspace = 0;
};

struct Caller {
  const Problem& problem;
  c10::ScalarType dtype;

  void check(cublasStatus_t status, const char* function) const {
    check_status(status, function, problem.gemm, dtype);
  }

  template <typename T>
  void set(cublasLtMatmulDescOpaque_t& operation, cublasLtMatmulDescAttributes_t attribute, const T& value) const {
    check(
        cublasLtMatmulDescSetAttribute(&operation, attribute, &value, sizeof(value)), "cublasLtMatmulDescSetAttribute"
    );
  }

  template <typename T>
  void set(
      cublasLtMatmulPreferenceOpaque_t& preference, cublasLtMatmulPreferenceAttributes_t attribute, T value
  ) const {
    check(
        cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
        "cublasLtMatmulPreferenceSetAttribute"
    );
  }

  cublasLtMatrixLayoutOpaque_t layout(cudaDataType_t type, int64_t rows, int64_t cols, const Operand& operand) const {
    cublasLtMatrixLayoutOpaque_t layout;
    if (operand.transpose) {
      std::swap(rows, cols);
    }
    check(cublasLtMatrixLayoutInit(&layout, type, rows, cols, operand.ld), "cublasLtMatrixLayoutInit");
    const auto batch = static_cast<int32_t>(problem.gemm.batch);
    const char* function = "cublasLtMatrixLayoutSetAttribute";
    check(
        cublasLtMatrixLayoutSetAttribute(&layout, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &batch, sizeof(batch)), function
    );
    check(
        cublasLtMatrixLayoutSetAttribute(
            &layout, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, &operand.stride, sizeof(operand.stride)
        ),
        function
    );
    return layout;
  }
};

void set_bias(const Caller& call, cublasLtMatmulDescOpaque_t& operation, const void* bias) {
  call.set(operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
}

Plan make_plan(cublasLtHandle_t handle, const Problem& problem, c10::ScalarType dtype, const void* bias) {
  const Caller call{problem, dtype};
  const Gemm& gemm = problem.gemm;
  const auto compute = static_cast<cublasComputeType_t>(problem.compute_type);
  const auto type = types_of(dtype, /*tf32=*/false).data;
  Plan plan{};
  call.check(cublasLtMatmulDescInit(&plan.operation, compute, CUDA_R_32F), "cublasLtMatmulDescInit");
  call.set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, gemm.a.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
  call.set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, gemm.b.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (problem.bias) {
    // C's columns are the layer's output rows: one element of the bias for each of their m elements, in every block.
    call.set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    call.set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, gemm.m);
    set_bias(call, plan.operation, bias); // the heuristic reads its alignment
  }
  plan.a = call.layout(type, gemm.m, gemm.k, gemm.a);
  plan.b = call.layout(type, gemm.k, gemm.n, gemm.b);
  plan.c = call.layout(type, gemm.m, gemm.n, gemm.c);

  cublasLtMatmulPreferenceOpaque_t preference;
  call.check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  call.set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(problem.workspace));
  const auto [a, b, c, unused] = problem.alignments;
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(a));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(b));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(c));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(c));
  if (!problem.any_reduction) {
    const uint32_t schemes = CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
    call.set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, schemes);
  }
  cublasLtMatmulHeuristicResult_t best{};
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(
      handle, &plan.operation, &plan.a, &plan.b, &plan.c, &plan.c, &preference, 1, &best, &count
  );
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) {
    call.check(status, "cublasLtMatmulAlgoGetHeuristic");
    if (count > 0 && best.state == CUBLAS_STATUS_SUCCESS) {
      plan.algorithm = best.algo;
      plan.workspace = best.workspaceSize;
    }
  }
  return plan;
}

/// Never destroyed: at exit, CUDA may be gone before.
LruCache<Problem::Key, Plan, KeyHash>& plans() {
  static auto* cache = new LruCache<Problem::Key, Plan, KeyHash>(4096);
  return *cache;
}

bool reductions_are_free(c10::ScalarType dtype) {
  const auto& context = at::globalContext();
  const auto allow = at::CuBLASReductionOption::AllowReducedPrecisionWithSplitK;
  return !context.deterministicAlgorithms() && (dtype != c10::kHalf || context.allowFP16ReductionCuBLAS() == allow) &&
         (dtype != c10::kBFloat16 || context.allowBF16ReductionCuBLAS() == allow);
}

/// What torch.backends and torch.set_float32_matmul_precision say, as ATen tells its own cuBLAS handle.
bool tf32_is_allowed(const Gemm& gemm) {
  cublasMath_t mode = CUBLAS_DEFAULT_MATH;
  const auto status = cublasGetMathMode(at::cuda::getCurrentCUDABlasHandle(), &mode);
  check_status(status, "cublasGetMathMode", gemm, c10::kFloat);
  return (mode & CUBLAS_TF32_TENSOR_OP_MATH) == CUBLAS_TF32_TENSOR_OP_MATH;
}

} // namespace

bool run_lt_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c) {
  constexpr int64_t kMaxBatch = 65535; // a grid dimension of batched kernels
  const bool known_dtype = dtype == c10::kHalf || dtype == c10::kBFloat16 || dtype == c10::kFloat;
  if (!known_dtype || gemm.batch > kMaxBatch) {
    return false;
  }
  const auto bytes = static_cast<int64_t>(c10::elementSize(dtype));
  const auto aligned = [&](const void* pointer, int64_t stride) {
    return alignment(reinterpret_cast<uintptr_t>(pointer), stride * bytes, gemm.batch);
  };
  const Problem problem{
      .gemm = gemm,
      .device = c10::cuda::current_device(),
      .dtype = static_cast<int64_t>(dtype),
      .compute_type = types_of(dtype, dtype == c10::kFloat && tf32_is_allowed(gemm)).compute,
      .bias = bias != nullptr,
      .any_reduction = reductions_are_free(dtype),
      .alignments =
          {aligned(a, gemm.a.stride),
           aligned(b, gemm.b.stride),
           aligned(c, gemm.c.stride),
           bias == nullptr ? 0 : aligned(bias, gemm.m)},
      .workspace = static_cast<int64_t>(at::cuda::getCUDABlasLtWorkspaceSize()),
  };
  const cublasLtHandle_t handle = at::cuda::getCurrentCUDABlasLtHandle();
  // A copy: the bias is this call's, and other threads use the plan too.
  Plan plan = *plans().get(problem.key(), [&] { return make_plan(handle, problem, dtype, bias); });
  if (!plan.algorithm) {
    return false;
  }
  const Caller call{problem, dtype};
  if (bias != nullptr) {
    set_bias(call, plan.operation, bias);
  }
  // Of the caching allocator, which knows of streams and of graph capture, and in whose order it is free again.
  const auto workspace = c10::cuda::CUDACachingAllocator::get()->allocate(plan.workspace);
  const float one = 1, zero = 0;
  call.check(
      cublasLtMatmul(
          handle,
          &plan.operation,
          &one,
          a,
          &plan.a,
          b,
          &plan.b,
          &zero,
          c,
          &plan.c,
          c,
          &plan.c,
          &*plan.algorithm,
          workspace.get(),
          plan.workspace,
          c10::cuda::getCurrentCUDAStream()
      ),
      "cublasLtMatmul"
  );
  return true;
}

} // namespace blockdiag::cuda
