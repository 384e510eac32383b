// MKL's batched GEMM.
//
// torch's x86 builds contain MKL. Its batched GEMM takes strided blocks in place, but torch calls it on contiguous
// batches only. Linking against it would break on torch builds with another BLAS, so it is looked up on first use.
#include "backend.h"

#include <ATen/Context.h>
#include <c10/util/SmallVector.h>
#include <c10/util/complex.h>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace blockdiag::cpu {
namespace {

// cblas_?gemm_batch with untyped pointers to scalars and matrices:
// https://www.intel.com/content/www/us/en/docs/onemkl/developer-reference-c/2024-2/cblas-gemm-batch.html
using MklGemmBatch = void (*)(
    int layout, const int* trans_a, const int* trans_b, const int* m, const int* n, const int* k, const void* alpha,
    const void** a, const int* lda, const void** b, const int* ldb, const void* beta, void** c, const int* ldc,
    int group_count, const int* group_size
);

struct Mkl {
  MklGemmBatch s = nullptr, d = nullptr, c = nullptr, z = nullptr;

  Mkl() {
#ifndef _WIN32
    if (!at::globalContext().hasMKL()) {
      return;
    }
    // Search torch's own library and its dependencies only: another BLAS in the process may have a function of this
    // name with 64-bit integers.
    Dl_info torch;
    if (dladdr(reinterpret_cast<const void*>(&at::globalContext), &torch) == 0) {
      return;
    }
    void* library = dlopen(torch.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) {
      return;
    }
    s = reinterpret_cast<MklGemmBatch>(dlsym(library, "cblas_sgemm_batch"));
    d = reinterpret_cast<MklGemmBatch>(dlsym(library, "cblas_dgemm_batch"));
    c = reinterpret_cast<MklGemmBatch>(dlsym(library, "cblas_cgemm_batch"));
    z = reinterpret_cast<MklGemmBatch>(dlsym(library, "cblas_zgemm_batch"));
#endif
  }

  bool available() const { return s != nullptr && d != nullptr && c != nullptr && z != nullptr; }
};

const Mkl& mkl() {
  static const Mkl functions;
  return functions;
}

/// The address of each block of an operand.
template <typename Pointer, typename T>
c10::SmallVector<Pointer, 32> block_starts(T* first, const Operand& operand, int64_t batch) {
  c10::SmallVector<Pointer, 32> starts;
  starts.reserve(static_cast<size_t>(batch));
  for (int64_t block = 0; block < batch; ++block) {
    starts.push_back(first + block * operand.stride);
  }
  return starts;
}

template <typename T>
void run(MklGemmBatch gemm_batch, const GemmProblem& problem, const Operands& operands) {
  constexpr int kColMajor = 102, kNoTrans = 111, kTrans = 112;
  const auto& gemm = problem.gemm;
  auto a = block_starts<const void*>(static_cast<const T*>(operands.a), gemm.a, gemm.batch);
  auto b = block_starts<const void*>(static_cast<const T*>(operands.b), gemm.b, gemm.batch);
  auto c = block_starts<void*>(static_cast<T*>(operands.c), gemm.c, gemm.batch);
  const int trans_a = gemm.a.transpose ? kTrans : kNoTrans;
  const int trans_b = gemm.b.transpose ? kTrans : kNoTrans;
  // The check guarantees that every size and leading dimension fits 32 bits.
  const int m = static_cast<int>(gemm.m), n = static_cast<int>(gemm.n), k = static_cast<int>(gemm.k);
  const int lda = static_cast<int>(gemm.a.ld), ldb = static_cast<int>(gemm.b.ld), ldc = static_cast<int>(gemm.c.ld);
  const int group_size = static_cast<int>(gemm.batch);
  const T alpha = 1;
  const T beta = problem.epilogue.accumulate ? 1 : 0;
  gemm_batch(
      kColMajor, &trans_a, &trans_b, &m, &n, &k, &alpha, a.data(), &lda, b.data(), &ldb, &beta, c.data(), &ldc,
      /*group_count=*/1, &group_size
  );
}

} // namespace

bool mkl_is_available() { return mkl().available(); }

/// Not half types: torch has no MKL function for them and computes them elsewhere.
bool mkl_takes(const GemmProblem& problem) { return !is_half(problem.dtype) && !problem.epilogue.bias_grad; }

bool mkl_run(const GemmProblem& given, const Operands& operands) {
  const auto problem = with_bias_written(given, operands);
  switch (problem.dtype) {
    case DType::kFloat32:
      run<float>(mkl().s, problem, operands);
      break;
    case DType::kFloat64:
      run<double>(mkl().d, problem, operands);
      break;
    case DType::kComplex64:
      run<c10::complex<float>>(mkl().c, problem, operands);
      break;
    default:
      run<c10::complex<double>>(mkl().z, problem, operands);
  }
  return true;
}

} // namespace blockdiag::cpu
