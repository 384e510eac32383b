#include "backend.h"

#include "kernels.h"

#include <ATen/Version.h>
#include <ATen/cpu/Utils.h>

namespace blockdiag::cpu {
namespace {

#ifdef BLOCKDIAG_CPU_KERNELS

using FindKernel = Kernel (*)(const GemmProblem& problem);

template <FindKernel find>
bool kernels_take(const GemmProblem& problem) {
  const auto& gemm = problem.gemm;
  // They sum B's rows where these are columns in memory, as those of a contiguous incoming gradient are.
  const bool sums = !problem.epilogue.bias_grad || gemm.b.transpose || (gemm.k == 1 && gemm.b.ld == 1);
  return !problem.epilogue.accumulate && sums && find(problem) != nullptr;
}

template <FindKernel find>
bool run_kernel(const GemmProblem& problem, const Operands& operands) {
  find(problem)(problem, operands);
  return true;
}

template <FindKernel find>
Provider provider_of(const char* name, decltype(Provider::run_sparse) run_sparse) {
  return {name, kernels_take<find>, run_kernel<find>, run_sparse};
}

bool has(const char* feature) {
  static const auto features = at::cpu::get_cpu_capabilities();
  const auto found = features.find(feature);
  return found != features.end() && found->second.isBool() && found->second.toBool();
}

/// Half types that torch multiplies with native instructions that our kernels do not use, in blocks large enough to
/// repay the calls and copies of its GEMM.
bool native_half_takes(const GemmProblem& problem) {
  static const bool bfloat16 = has("amx_bf16"), float16 = has("avx512_fp16") || has("amx_fp16");
  const auto& gemm = problem.gemm;
  return gemm.m * gemm.n * gemm.k >= int64_t{1} << 21 && aten_takes(problem) &&
         ((problem.dtype == DType::kBFloat16 && bfloat16) || (problem.dtype == DType::kFloat16 && float16));
}

/// The CPU's instruction sets, widest first. ATEN_CPU_CAPABILITY limits them, as it limits torch's kernels.
void add_kernels(std::vector<Provider>& providers) {
  const auto capability = at::get_cpu_capability();
  if (!has("f16c") || (capability != "AVX2" && capability != "AVX512")) {
    return;
  }
  if (has("amx_bf16") || has("avx512_fp16") || has("amx_fp16")) {
    providers.push_back({"native_half", native_half_takes, aten_run});
  }
  if (capability == "AVX512") {
    if (has("avx512_bf16")) {
      providers.push_back(provider_of<avx512_bf16_kernel>("avx512_bf16", nullptr));
    }
    providers.push_back(provider_of<avx512_kernel>("avx512", avx512_sparse));
  }
  providers.push_back(provider_of<avx2_kernel>("avx2", avx2_sparse));
}

#endif

std::vector<Provider> all_providers() {
  std::vector<Provider> providers;
#ifdef BLOCKDIAG_CPU_KERNELS
  add_kernels(providers);
#endif
  if (mkl_is_available()) {
    providers.push_back({"mkl", mkl_takes, mkl_run});
  }
  providers.push_back({"aten", aten_takes, aten_run, portable_sparse});
  return providers;
}

} // namespace

Providers& backend() {
  static Providers providers(all_providers(), "BLOCKDIAG_CPU_GEMM", /*preferred=*/nullptr, " on this CPU");
  return providers;
}

} // namespace blockdiag::cpu
