// The GEMM with its epilogue in one kernel, by cuBLASLt. Not run on a GPU yet, and therefore used only if asked for.
#include "lt.h"

#include "cublas.h"
#include "gemm.h"
#include "tune.h"

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

/// Never destroyed: at exit, CUDA may be gone before.
LruCache<Problem::Key, Plan, KeyHash>& plans() {
  static auto* cache = new LruCache<Problem::Key, Plan, KeyHash>(4096);
  return *cache;
}

void create_handle(cublasLtHandle_t* handle) {
  // The stream may be captured, or another thread's.
  const c10::cuda::CUDAStreamCaptureModeGuard guard(cudaStreamCaptureModeRelaxed);
  const auto status = cublasLtCreate(handle);
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "blockdiag: cublasLtCreate returned ", cublasGetStatusName(status));
}

void keep_handle(cublasLtHandle_t /*handle*/) {} // at exit, CUDA may be gone before

/// One for each thread and device, as ATen keeps its own. ATen's is that of cuBLAS: with it comes cuBLAS's workspace of the
/// current stream, 32 MiB on some GPUs, which cuBLASLt does not use.
cublasLtHandle_t handle_of(c10::DeviceIndex device) {
  using Pool = at::cuda::DeviceThreadHandlePool<cublasLtHandle_t, create_handle, keep_handle>;
  static const auto pool = std::make_shared<Pool>();
  thread_local const std::unique_ptr<Pool::PoolWindow> window(pool->newPoolWindow());
  return window->reserve(device);
}

/// The ways to add up parts of a sum that torch.backends.cuda.matmul and deterministic mode allow, as ATen takes them.
int64_t allowed_reductions(c10::ScalarType dtype) {
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

bool has_dtype(c10::ScalarType dtype) {
  return dtype == c10::kHalf || dtype == c10::kBFloat16 || dtype == c10::kFloat;
}

/// Whether cuBLASLt is asked at all.
bool is_for_lt(const Gemm& gemm, c10::ScalarType dtype, Epilogue epilogue) {
  constexpr int64_t kMaxBatch = 65535; // a grid dimension of batched kernels
  // Before CUDA 13.2 a leading dimension beyond 2^31 bytes is read wrongly (CUB-9572), before 12.8 Update 1 a bias of a
  // vector (5104822).
  const int64_t max_ld = kBlasMax / static_cast<int64_t>(c10::elementSize(dtype));
  return has_dtype(dtype) && gemm.batch <= kMaxBatch && std::max({gemm.a.ld, gemm.b.ld, gemm.c.ld}) <= max_ld &&
         (epilogue == Epilogue::kNone || (gemm.m > 1 && gemm.n > 1));
}

/// Whether a bias gradient is computed with the weight's: where that may be known to be faster, and not in deterministic
/// mode, as it is not documented how the epilogue sums.
bool may_use_bias_grad_epilogue(c10::ScalarType dtype) {
  return has_dtype(dtype) && tuning().used > 0 && !at::globalContext().deterministicAlgorithms();
}

std::atomic<int64_t> calls{0}, left_to_cublas{0};

bool run(const Gemm& gemm, c10::ScalarType dtype, Epilogue epilogue, const Operands& operands) {
  if (!is_for_lt(gemm, dtype, epilogue)) {
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
      .epilogue = epilogue,
      .reductions = allowed_reductions(dtype),
      .alignments =
          {aligned(operands.a, gemm.a.stride),
           aligned(operands.b, gemm.b.stride),
           aligned(operands.c, gemm.c.stride),
           epilogue == Epilogue::kNone ? 0 : aligned(operands.bias, epilogue == Epilogue::kBias ? gemm.m : gemm.n)},
      .workspace = static_cast<int64_t>(at::cuda::getCUDABlasLtWorkspaceSize()),
      .deterministic = at::globalContext().deterministicAlgorithms(),
  };
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
    } else if (epilogue == Epilogue::kBiasGrad) {
      return false; // its epilogue is used where it is known to be faster
    }
  }
  if (plan->candidates.empty()) {
    return false;
  }
  const Candidate& candidate = plan->candidates[0];
  // Of the caching allocator, which knows of streams and of graph capture, and in whose order it is free again.
  c10::DataPtr workspace;
  if (candidate.workspace > 0) {
    workspace = c10::cuda::CUDACachingAllocator::get()->allocate(candidate.workspace);
  }
  const auto status = launch(handle, *plan, candidate, operands, workspace.get());
  if (is_unsupported(status)) {
    auto none = *plan; // remembered, as it would answer so again
    none.candidates.clear();
    plans().set(problem.key(), std::move(none));
    return false;
  }
  check_status(status, "cublasLtMatmul", gemm, dtype);
  return true;
}

} // namespace

bool run_lt_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, const void* bias, void* c) {
  // cuBLASLt takes the bias it reads and the one it writes by one pointer.
  const auto epilogue = bias == nullptr ? Epilogue::kNone : Epilogue::kBias;
  const bool done = run(gemm, dtype, epilogue, {a, b, c, const_cast<void*>(bias)});
  ++(done ? calls : left_to_cublas);
  return done;
}

bool run_lt_weight_bias_grad(
    const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, void* bias_grad
) {
  const bool done = may_use_bias_grad_epilogue(dtype) && run(gemm, dtype, Epilogue::kBiasGrad, {a, b, c, bias_grad});
  calls += done;
  return done;
}

bool may_fuse_bias_grad(c10::ScalarType dtype) {
  const auto library = preferred_library();
  const bool is_small_dtype = dtype == c10::kHalf || dtype == c10::kBFloat16;
  return (library == Library::kSmallBlocks && is_small_dtype) ||
         (library != Library::kCublas && may_use_bias_grad_epilogue(dtype));
}

std::string lt_calls() {
  return std::to_string(calls) + " calls, " + std::to_string(left_to_cublas) + " left to cuBLAS";
}

} // namespace blockdiag::cuda
