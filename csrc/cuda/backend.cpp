#include "backend.h"

#include "kernels/small_blocks.h"

namespace blockdiag::cuda {

Providers& backend() {
  static Providers providers(
      {
          {"small_blocks", small_blocks_take, run_small_blocks},
          {"fused", fused_takes, fused_run},
          {"cublaslt", cublaslt_takes, cublaslt_run},
          {"cublas", cublas_takes, cublas_run},
      },
      "BLOCKDIAG_CUDA_GEMM", "cublaslt"
  );
  return providers;
}

bool fuses() { return backend().preferred() == "fused" || backend().preferred() == "small_blocks"; }

} // namespace blockdiag::cuda
