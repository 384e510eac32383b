#include "include/blockdiag.h"

#include "cpu/backend.h"

#include <torch/version.h>

#ifdef BLOCKDIAG_CUDA
#include "cuda/backend.h"

#include <cuda.h>
#endif

namespace blockdiag {

// The Python package reads this string before it loads the compiled module, to name both versions on a mismatch.
extern const char kBuiltForTorch[];
const char kBuiltForTorch[] = "blockdiag was built for torch " TORCH_VERSION;

std::map<std::string, std::string> build_info() {
  const std::string built_for = kBuiltForTorch;
  std::map<std::string, std::string> info = {
      {"version", BLOCKDIAG_VERSION},
      {"torch", built_for.substr(built_for.rfind(' ') + 1)},
      {"compiler", __VERSION__},
      {"cpu_gemm", cpu::backend().preferred()},
      {"cpu_gemms", cpu::backend().names()},
  };
#ifdef BLOCKDIAG_CUDA
  info["cuda_gemm"] = cuda::backend().preferred();
  info["cublaslt"] = cuda::cublaslt_calls();
  info["cublas"] = cuda::cublas_versions();
  info["cuda"] = std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
#else
  info["cuda"] = "none";
#endif
  return info;
}

} // namespace blockdiag
