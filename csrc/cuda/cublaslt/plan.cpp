// A problem in cuBLASLt's descriptors, and the algorithms that its heuristic recommends.
#include "plan.h"

#include "cuda/cublas.h"

#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <array>
#include <utility>

namespace blockdiag::cuda {
namespace {

struct Caller {
  const GemmProblem& problem;

  void check(cublasStatus_t status, const char* function) const { check_status(status, function, problem); }

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

/// Whether the algorithm is known to be correct. From 12.6.3 to 13.7.0 algorithm 66 sums wrongly if it splits k into
/// parts that do not divide it (NVIDIA 6580689, fixed in CUDA 13.4 Update 1). An unknown attribute is not trusted.
bool is_sound(const cublasLtMatmulAlgo_t& algorithm, int64_t k) {
  const auto read = [&](cublasLtMatmulAlgoConfigAttributes_t attribute) -> std::optional<int32_t> {
    int32_t value = 0;
    size_t written = 0;
    const auto status = cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof(value), &written);
    return status == CUBLAS_STATUS_SUCCESS && written == sizeof(value) ? std::optional(value) : std::nullopt;
  };
  const auto id = read(CUBLASLT_ALGO_CONFIG_ID);
  if (!id || *id != 66) {
    return id.has_value();
  }
  const auto splits = read(CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  return splits && (*splits <= 1 || k % *splits == 0);
}

} // namespace

std::optional<Plan> make_plan(cublasLtHandle_t handle, const LtProblem& problem) {
  const Caller call{problem};
  const auto& gemm = problem.gemm;
  const auto& epilogue = problem.epilogue;
  const auto compute = static_cast<cublasComputeType_t>(problem.compute_type);
  const auto type = types_of(problem.dtype, /*tf32=*/false).data;
  const auto type_c = types_of(dtype_of_c(problem), /*tf32=*/false).data; // and of the bias or its gradient
  const auto [align_a, align_b, align_c, align_bias] = problem.alignments;
  Plan plan{};
  call.check(cublasLtMatmulDescInit(&plan.operation, compute, CUDA_R_32F), "cublasLtMatmulDescInit");
  call.set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, gemm.a.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
  call.set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, gemm.b.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
  if (epilogue.bias || epilogue.bias_grad) {
    // C's columns are the layer's output rows, so each block's bias has m elements. Its gradient is B's sum over k: one
    // element for each of B's n columns.
    const auto fused = epilogue.bias_grad ? CUBLASLT_EPILOGUE_BGRADB : CUBLASLT_EPILOGUE_BIAS;
    call.set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, fused);
    call.set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, epilogue.bias_grad ? gemm.n : gemm.m);
    // The heuristic reads the pointer's alignment: exactly the problem's, so that plans do not depend on callers.
    const void* aligned = reinterpret_cast<const void*>(align_bias);
    call.set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, aligned);
  }
  plan.a = call.layout(type, gemm.m, gemm.k, gemm.a);
  plan.b = call.layout(type, gemm.k, gemm.n, gemm.b);
  plan.c = call.layout(type_c, gemm.m, gemm.n, gemm.c);

  cublasLtMatmulPreferenceOpaque_t preference;
  call.check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  call.set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(problem.workspace));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(align_a));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(align_b));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(align_c));
  const int64_t align_d = align_bias == 0 ? align_c : std::min(align_c, align_bias);
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(align_d));
  call.set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(problem.reductions));

  std::array<cublasLtMatmulHeuristicResult_t, 16> found{}; // fastest first, by the heuristic's estimate
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(
      handle, &plan.operation, &plan.a, &plan.b, &plan.c, &plan.c, &preference, static_cast<int>(found.size()),
      found.data(), &count
  );
  if (is_unsupported(status)) {
    return plan;
  }
  if (status != CUBLAS_STATUS_SUCCESS &&
      c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    return std::nullopt;
  }
  call.check(status, "cublasLtMatmulAlgoGetHeuristic");
  for (int i = 0; i < count; ++i) {
    if (found[i].state == CUBLAS_STATUS_SUCCESS && is_sound(found[i].algo, gemm.k)) {
      plan.candidates.push_back({found[i].algo, found[i].workspaceSize});
    }
  }
  return plan;
}

cublasStatus_t launch(
    cublasLtHandle_t handle, const Plan& plan, const Candidate& candidate, const Operands& operands, void* workspace
) {
  // A copy: the pointer belongs to this call, and other threads share the plan.
  auto operation = plan.operation;
  // One attribute serves the bias and its gradient: a problem has at most one of them.
  if (const void* bias = operands.bias != nullptr ? operands.bias : operands.bias_grad) {
    const auto status =
        cublasLtMatmulDescSetAttribute(&operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias));
    if (status != CUBLAS_STATUS_SUCCESS) {
      return status;
    }
  }
  const float one = 1, zero = 0;
  return cublasLtMatmul(
      handle, &operation, &one, operands.a, &plan.a, operands.b, &plan.b, &zero, operands.c, &plan.c, operands.c,
      &plan.c, &candidate.algorithm, workspace, candidate.workspace, c10::cuda::getCurrentCUDAStream()
  );
}

} // namespace blockdiag::cuda
