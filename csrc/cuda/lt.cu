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

#include <algorithm>
#include <array>
#include <atomic>
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

/// What cuBLASLt answers where it has no kernel; by its documentation the first alone.
bool is_unsupported(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
         status == CUBLAS_STATUS_ARCH_MISMATCH;
}

/// Whether the algorithm computes what it should. From 12.6.3 to 13.7.0 algorithm 66 sums wrongly if it splits k into parts
/// that do not divide it (NVIDIA 6580689, mended in CUDA 13.4 Update 1).
bool is_sound(const cublasLtMatmulAlgo_t& algorithm, const Caller& call) {
  const auto read = [&](cublasLtMatmulAlgoConfigAttributes_t attribute) {
    int32_t value = 0;
    size_t written = 0;
    call.check(
        cublasLtMatmulAlgoConfigGetAttribute(&algorithm, attribute, &value, sizeof(value), &written),
        "cublasLtMatmulAlgoConfigGetAttribute"
    );
    return value;
  };
  const int32_t splits = read(CUBLASLT_ALGO_CONFIG_SPLITK_NUM);
  return splits <= 1 || read(CUBLASLT_ALGO_CONFIG_ID) != 66 || call.problem.gemm.k % splits == 0;
}

Plan make_plan(cublasLtHandle_t handle, const Problem& problem, c10::ScalarType dtype) {
  const Caller call{problem, dtype};
  const Gemm& gemm = problem.gemm;
  const auto compute = static_cast<cublasComputeType_t>(problem.compute_type);
  const auto type = types_of(dtype, /*tf32=*/false).data;
  Plan plan{};
  call.check(cublasLtMatmulDescInit(&plan.operation, compute, CUDA_R_32F), "cublasLtMatmulDescInit");
  call.set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSA, gemm.a.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
  call.set(plan.operation, CUBLASLT_MATMUL_DESC_TRANSB, gemm.b.transpose ? CUBLAS_OP_T : CUBLAS_OP_N);
  const auto [align_a, align_b, align_c, align_bias] = problem.alignments;
  if (problem.bias) {
    // C's columns are the layer's output rows: one element of the bias for each of their m elements, in every block.
    call.set(plan.operation, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    call.set(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, gemm.m);
    // The heuristic reads the pointer's alignment: one of just that, so that the plan does not depend on the first caller.
    set_bias(call, plan.operation, reinterpret_cast<const void*>(align_bias));
  }
  plan.a = call.layout(type, gemm.m, gemm.k, gemm.a);
  plan.b = call.layout(type, gemm.k, gemm.n, gemm.b);
  plan.c = call.layout(type, gemm.m, gemm.n, gemm.c);

  cublasLtMatmulPreferenceOpaque_t preference;
  call.check(cublasLtMatmulPreferenceInit(&preference), "cublasLtMatmulPreferenceInit");
  call.set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(problem.workspace));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(align_a));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(align_b));
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(align_c));
  const int64_t align_d = problem.bias ? std::min(align_c, align_bias) : align_c;
  call.set(preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(align_d));
  call.set(preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(problem.reductions));

  std::array<cublasLtMatmulHeuristicResult_t, 8> candidates{}; // the fastest first, by the heuristic's estimate
  int count = 0;
  const auto status = cublasLtMatmulAlgoGetHeuristic(
      handle,
      &plan.operation,
      &plan.a,
      &plan.b,
      &plan.c,
      &plan.c,
      &preference,
      static_cast<int>(candidates.size()),
      candidates.data(),
      &count
  );
  if (is_unsupported(status)) {
    return plan;
  }
  call.check(status, "cublasLtMatmulAlgoGetHeuristic");
  for (int i = 0; i < count && !plan.algorithm; ++i) {
    if (candidates[i].state == CUBLAS_STATUS_SUCCESS && is_sound(candidates[i].algo, call)) {
      plan.algorithm = candidates[i].algo;
      plan.workspace = candidates[i].workspaceSize;
    }
  }
  return plan;
}

/// Never destroyed: at exit, CUDA may be gone before.
LruCache<Problem::Key, Plan, KeyHash>& plans() {
  static auto* cache = new LruCache<Problem::Key, Plan, KeyHash>(4096);
  return *cache;
}

/// The ways to add up parts of a sum that torch.backends.cuda.matmul and deterministic mode allow, as ATen takes them.
int64_t allowed_reductions(c10::ScalarType dtype) {
  using Option = at::CuBLASReductionOption;
  const auto& context = at::globalContext();
  auto option = Option::AllowReducedPrecisionWithSplitK;
  if (dtype == c10::kHalf) {
    option = context.allowFP16ReductionCuBLAS();
  } else if (dtype == c10::kBFloat16) {
    option = context.allowBF16ReductionCuBLAS();
  }
  if (option == Option::DisallowReducedPrecisionDisallowSplitK) {
    return CUBLASLT_REDUCTION_SCHEME_NONE;
  }
  const bool all = option == Option::AllowReducedPrecisionWithSplitK && !context.deterministicAlgorithms();
  return all ? CUBLASLT_REDUCTION_SCHEME_MASK : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

bool tf32_is_allowed() {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 && !at::NoTF32Guard::should_disable_tf32();
}

/// Whether cuBLASLt is asked at all.
bool is_for_lt(const Gemm& gemm, c10::ScalarType dtype, bool bias) {
  constexpr int64_t kMaxBatch = 65535; // a grid dimension of batched kernels
  const bool has_dtype = dtype == c10::kHalf || dtype == c10::kBFloat16 || dtype == c10::kFloat;
  // Before CUDA 13.2 a leading dimension beyond 2^31 bytes is read wrongly (CUB-9572), before 12.8 Update 1 a bias of a
  // vector (5104822).
  const int64_t max_ld = kBlasMax / static_cast<int64_t>(c10::elementSize(dtype));
  return has_dtype && gemm.batch <= kMaxBatch && std::max({gemm.a.ld, gemm.b.ld, gemm.c.ld}) <= max_ld &&
         !(bias && (gemm.m == 1 || gemm.n == 1));
}

std::atomic<int64_t> calls{0}, left_to_cublas{0};

bool run(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c) {
  if (!is_for_lt(gemm, dtype, bias != nullptr)) {
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
      .compute_type = types_of(dtype, dtype == c10::kFloat && tf32_is_allowed()).compute,
      .bias = bias != nullptr,
      .reductions = allowed_reductions(dtype),
      .alignments =
          {aligned(a, gemm.a.stride),
           aligned(b, gemm.b.stride),
           aligned(c, gemm.c.stride),
           bias == nullptr ? 0 : aligned(bias, gemm.m)},
      .workspace = static_cast<int64_t>(at::cuda::getCUDABlasLtWorkspaceSize()),
  };
  const cublasLtHandle_t handle = at::cuda::getCurrentCUDABlasLtHandle();
  // A copy: the bias is this call's, and other threads use the plan too.
  Plan plan = *plans().get(problem.key(), [&] { return make_plan(handle, problem, dtype); });
  if (!plan.algorithm) {
    return false;
  }
  const Caller call{problem, dtype};
  if (bias != nullptr) {
    set_bias(call, plan.operation, bias);
  }
  // Of the caching allocator, which knows of streams and of graph capture, and in whose order it is free again.
  c10::DataPtr workspace;
  if (plan.workspace > 0) {
    workspace = c10::cuda::CUDACachingAllocator::get()->allocate(plan.workspace);
  }
  const float one = 1, zero = 0;
  const auto status = cublasLtMatmul(
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
  );
  if (is_unsupported(status)) {
    return false;
  }
  call.check(status, "cublasLtMatmul");
  return true;
}

} // namespace

bool run_lt_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c) {
  const bool done = run(gemm, dtype, a, b, bias, c);
  ++(done ? calls : left_to_cublas);
  return done;
}

std::string lt_calls() {
  return std::to_string(calls) + " calls, " + std::to_string(left_to_cublas) + " left to cuBLAS";
}

} // namespace blockdiag::cuda
