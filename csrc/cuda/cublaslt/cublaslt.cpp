// cuBLASLt: product and epilogue in one kernel. `fused` is what of that has not run on a GPU yet, and so is opt-in.
#include "cuda/backend.h"
#include "cuda/cublas.h"
#include "lru_cache.h"
#include "plan.h"
#include "tuning.h"

#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/cuda/detail/DeviceThreadHandles.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>

#include <algorithm>
#include <atomic>

namespace blockdiag::cuda {
namespace {

/// Never destroyed: at exit, CUDA may be gone first.
LruCache<LtProblem::Key, Plan, KeyHash>& plans() {
  static auto* cache = new LruCache<LtProblem::Key, Plan, KeyHash>(4096);
  return *cache;
}

void create_handle(cublasLtHandle_t* handle) {
  // This stream, or another thread's, may be in a capture.
  const c10::cuda::CUDAStreamCaptureModeGuard guard(cudaStreamCaptureModeRelaxed);
  const auto status = cublasLtCreate(handle);
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "blockdiag: cublasLtCreate returned ", cublasGetStatusName(status));
}

void keep_handle(cublasLtHandle_t /*handle*/) {} // at exit, CUDA may be gone first

/// One per thread and device, like ATen's. ATen's own is a cuBLAS handle and brings cuBLAS's workspace for the current
/// stream, 32 MiB on some GPUs, which cuBLASLt does not use.
cublasLtHandle_t handle_of(c10::DeviceIndex device) {
  using Pool = at::cuda::DeviceThreadHandlePool<cublasLtHandle_t, create_handle, keep_handle>;
  static const auto pool = std::make_shared<Pool>();
  thread_local const std::unique_ptr<Pool::PoolWindow> window(pool->newPoolWindow());
  return window->reserve(device);
}

/// The reductions of split sums that torch.backends.cuda.matmul and deterministic mode allow, as in ATen.
int64_t allowed_reductions(DType dtype) {
  using Option = at::CuBLASReductionOption;
  const auto option = reduction_option(dtype);
  if (option == Option::DisallowReducedPrecisionDisallowSplitK) {
    return CUBLASLT_REDUCTION_SCHEME_NONE;
  }
  const bool all = option == Option::AllowReducedPrecisionWithSplitK && !at::globalContext().deterministicAlgorithms();
  return all ? CUBLASLT_REDUCTION_SCHEME_MASK : CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
}

bool tf32_is_allowed() {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 && !at::NoTF32Guard::should_disable_tf32();
}

std::atomic<int64_t> calls{0}, left_to_cublas{0};

LtProblem describe(const GemmProblem& problem, const Operands& operands) {
  const auto& [gemm, dtype, epilogue, float32] = problem;
  const auto aligned = [&](const void* pointer, int64_t stride, DType type) {
    return alignment(reinterpret_cast<uintptr_t>(pointer), stride * size_of(type), gemm.batch);
  };
  const auto dtype_c = dtype_of_c(problem);
  return {
      problem,
      /*device=*/c10::cuda::current_device(),
      /*compute_type=*/types_of(dtype, dtype == DType::kFloat32 && tf32_is_allowed()).compute,
      /*reductions=*/allowed_reductions(dtype),
      /*alignments=*/
      {
          aligned(operands.a, gemm.a.stride, dtype),
          aligned(operands.b, gemm.b.stride, dtype),
          aligned(operands.c, gemm.c.stride, dtype_c),
          epilogue.bias        ? aligned(operands.bias, gemm.m, dtype_c)
          : epilogue.bias_grad ? aligned(operands.bias_grad, gemm.n, dtype_c)
                               : 0,
      },
      /*workspace=*/static_cast<int64_t>(at::cuda::getCUDABlasLtWorkspaceSize()),
      /*deterministic=*/at::globalContext().deterministicAlgorithms(),
  };
}

/// `fuse`: sum a bias's gradient in the epilogue even where that is not known to be faster.
bool run(const LtProblem& problem, const Operands& operands, bool fuse) {
  const cublasLtHandle_t handle = handle_of(static_cast<c10::DeviceIndex>(problem.device));
  auto plan = plans().find(problem.key());
  if (!plan) {
    auto made = make_plan(handle, problem);
    if (!made) {
      return false;
    }
    plan = plans().get(problem.key(), [&] { return std::move(*made); });
  }
  if (tuning().used > 0 && !plan->candidates.empty()) {
    if (auto tuned = tuned_plan(handle, plan, problem, operands)) {
      plan = std::move(tuned);
    } else if (problem.epilogue.bias_grad && !fuse) {
      return false;
    }
  }
  if (plan->candidates.empty()) {
    return false;
  }
  const Candidate& candidate = plan->candidates[0];
  // The caching allocator supports graph capture, and frees in stream order.
  c10::DataPtr workspace;
  if (candidate.workspace > 0) {
    workspace = c10::cuda::CUDACachingAllocator::get()->allocate(candidate.workspace);
  }
  const auto status = launch(handle, *plan, candidate, operands, workspace.get());
  if (is_unsupported(status)) {
    auto none = *plan; // cached, as the answer would not change
    none.candidates.clear();
    plans().set(problem.key(), std::move(none));
    return false;
  }
  check_status(status, "cublasLtMatmul", problem);
  return true;
}

bool run(const GemmProblem& problem, const Operands& operands, bool fuse) {
  const bool done = run(describe(problem, operands), operands, fuse);
  calls += done;
  left_to_cublas += !done && !problem.epilogue.bias_grad;
  return done;
}

bool is_of_a_vector(const GemmProblem& problem) {
  const auto& [gemm, dtype, epilogue, float32] = problem;
  return (epilogue.bias || epilogue.bias_grad) && (gemm.m == 1 || gemm.n == 1);
}

} // namespace

bool fused_takes(const GemmProblem& problem) {
  const auto& [gemm, dtype, epilogue, float32] = problem;
  constexpr int64_t kMaxBatch = 65535; // a grid dimension of batched kernels
  // cuBLASLt misreads a leading dimension beyond 2^31 bytes before CUDA 13.2 (CUB-9572), and a bias of a vector before
  // 12.8 Update 1 (5104822).
  static const bool misreads_bias = cublasLtGetVersion() < 120804;
  const int64_t max_ld = kBlasMax / size_of(dtype_of_c(problem));
  if (!(is_half(dtype) || dtype == DType::kFloat32) || !operands_are_of_one_type(float32) ||
      (float32.c && epilogue.bias) || epilogue.accumulate || gemm.batch > kMaxBatch ||
      std::max({gemm.a.ld, gemm.b.ld, gemm.c.ld}) > max_ld || (misreads_bias && is_of_a_vector(problem))) {
    return false;
  }
  // A bias gradient is not fused with the weight's in deterministic mode, as the epilogue's order of summation is not
  // documented.
  return !epilogue.bias_grad || !at::globalContext().deterministicAlgorithms();
}

bool fused_run(const GemmProblem& problem, const Operands& operands) { return run(problem, operands, /*fuse=*/true); }

bool cublaslt_takes(const GemmProblem& problem) {
  // As a fallback it would only ask again what `fused` has asked.
  return !fuses() && fused_takes(problem) && !problem.float32.any() && !is_of_a_vector(problem) &&
         (!problem.epilogue.bias_grad || tuning().used > 0);
}

bool cublaslt_run(const GemmProblem& problem, const Operands& operands) {
  return run(problem, operands, /*fuse=*/false);
}

std::string cublaslt_calls() {
  return std::to_string(calls) + " calls, " + std::to_string(left_to_cublas) + " left to cuBLAS";
}

} // namespace blockdiag::cuda
