#include "gemm.h"

#include "kernel/kernels.h"

#include <ATen/Context.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>
#include <c10/util/StringUtil.h>
#include <c10/util/complex.h>
#include <c10/util/env.h>

#include <algorithm>
#include <string>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace blockdiag::cpu {
namespace {

// ---- The choice --------------------------------------------------------------------------------------------------------

/// The kernels that this CPU runs; null where there are none.
struct Choice {
  Kernel<float> float32 = nullptr;
  Kernel<c10::BFloat16> bfloat16 = nullptr;
  Kernel<c10::Half> float16 = nullptr;
  // Whether torch multiplies the type with instructions that our kernel does not use. Not where a kernel is asked for.
  bool native_bfloat16 = false, native_float16 = false;
  std::string name; // of the instruction set

  Choice() {
    std::vector<std::string> supported = {"aten"};
    if (at::globalContext().hasMKL()) {
      supported.emplace_back("mkl");
    }
    const auto features = at::cpu::get_cpu_capabilities();
    const auto has = [&](const char* feature) {
      const auto found = features.find(feature);
      return found != features.end() && found->second.isBool() && found->second.toBool();
    };
#ifdef BLOCKDIAG_CPU_KERNELS
    // ATEN_CPU_CAPABILITY limits it, as it limits torch's own kernels.
    const auto capability = at::get_cpu_capability();
    if (has("f16c") && (capability == "AVX2" || capability == "AVX512")) {
      supported.emplace_back("avx2");
      if (capability == "AVX512") {
        supported.emplace_back("avx512");
        if (has("avx512_bf16")) {
          supported.emplace_back("avx512_bf16");
        }
      }
    }
#endif
    const auto asked = c10::utils::get_env("BLOCKDIAG_CPU_GEMM");
    name = asked.value_or(supported.back());
    TORCH_CHECK(
        std::find(supported.begin(), supported.end(), name) != supported.end(),
        "blockdiag: expected BLOCKDIAG_CPU_GEMM to be one of [",
        c10::Join(", ", supported),
        "] on this CPU, but got \"",
        name,
        "\""
    );
#ifdef BLOCKDIAG_CPU_KERNELS
    if (name.starts_with("avx")) {
      const auto& kernels = name == "avx2" ? avx2_kernels : avx512_kernels;
      float32 = kernels.float32;
      bfloat16 = name == "avx512_bf16" ? avx512_bf16_kernel : kernels.bfloat16;
      float16 = kernels.float16;
      native_bfloat16 = !asked && has("amx_bf16");
      native_float16 = !asked && (has("avx512_fp16") || has("amx_fp16"));
    }
#endif
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

// ---- MKL's batched GEMM ------------------------------------------------------------------------------------------------
//
// torch's x86 builds carry MKL. Its batched GEMM takes the blocks where they lie, but torch calls it on contiguous batches
// only, and a link against it would break on torch builds with another BLAS: so it is looked up when it is first needed.

// cblas_?gemm_batch of https://www.intel.com/content/www/us/en/docs/onemkl/developer-reference-c/2024-2/cblas-gemm-batch.html
// with the pointers to scalars and matrices untyped.
using MklGemmBatch = void (*)(
    int layout,
    const int* trans_a,
    const int* trans_b,
    const int* m,
    const int* n,
    const int* k,
    const void* alpha,
    const void** a,
    const int* lda,
    const void** b,
    const int* ldb,
    const void* beta,
    void** c,
    const int* ldc,
    int group_count,
    const int* group_size
);

struct Mkl {
  MklGemmBatch s = nullptr, d = nullptr, c = nullptr, z = nullptr;

  Mkl() {
#ifndef _WIN32
    if (!at::globalContext().hasMKL() || choice().name == "aten") {
      return;
    }
    // Searched in torch's own library and what it links, not in all that the process has loaded: another BLAS there may
    // have a function of this name with 64-bit integers.
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

  bool available() const {
    return s != nullptr && d != nullptr && c != nullptr && z != nullptr;
  }
};

const Mkl& mkl() {
  static const Mkl functions;
  return functions;
}

/// Where each block of an operand starts.
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
void mkl_gemm(MklGemmBatch gemm_batch, const Gemm& gemm, const T* a, const T* b, T* c, bool accumulate) {
  constexpr int kColMajor = 102, kNoTrans = 111, kTrans = 112;
  auto a_blocks = block_starts<const void*>(a, gemm.a, gemm.batch);
  auto b_blocks = block_starts<const void*>(b, gemm.b, gemm.batch);
  auto c_blocks = block_starts<void*>(c, gemm.c, gemm.batch);
  const int trans_a = gemm.a.transpose ? kTrans : kNoTrans;
  const int trans_b = gemm.b.transpose ? kTrans : kNoTrans;
  // The check has made sure that every size and leading dimension fits 32 bits.
  const int m = static_cast<int>(gemm.m), n = static_cast<int>(gemm.n), k = static_cast<int>(gemm.k);
  const int lda = static_cast<int>(gemm.a.ld), ldb = static_cast<int>(gemm.b.ld), ldc = static_cast<int>(gemm.c.ld);
  const int group_size = static_cast<int>(gemm.batch);
  const T alpha = 1;
  const T beta = accumulate ? 1 : 0;
  gemm_batch(
      kColMajor,
      &trans_a,
      &trans_b,
      &m,
      &n,
      &k,
      &alpha,
      a_blocks.data(),
      &lda,
      b_blocks.data(),
      &ldb,
      &beta,
      c_blocks.data(),
      &ldc,
      1,
      &group_size
  );
}

// ---- ATen --------------------------------------------------------------------------------------------------------------

/// op(matrix) as a row-major (batch, rows, cols) tensor on the same memory.
at::Tensor row_major(
    const void* data, const Gemm& gemm, const Operand& op, int64_t rows, int64_t cols, c10::ScalarType dtype
) {
  return at::from_blob(
      const_cast<void*>(data),
      {gemm.batch, rows, cols},
      {op.stride, op.transpose ? 1 : op.ld, op.transpose ? op.ld : 1},
      at::TensorOptions().dtype(dtype)
  );
}

void aten_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate) {
  const auto left = row_major(b, gemm, gemm.b, gemm.n, gemm.k, dtype);
  const auto right = row_major(a, gemm, gemm.a, gemm.k, gemm.m, dtype);
  const auto out = row_major(c, gemm, gemm.c, gemm.n, gemm.m, dtype);
  // bmm may copy strided operands and compute a strided result in a copy: so that no copy grows with the tensors, it gets
  // few blocks at a time, and large blocks go to mm, which copies none.
  constexpr int64_t kCopyBytes = 1 << 18;
  const int64_t largest = std::max({gemm.n * gemm.m, gemm.n * gemm.k, gemm.k * gemm.m});
  const int64_t step = std::max<int64_t>(kCopyBytes / (largest * static_cast<int64_t>(c10::elementSize(dtype))), 1);
  for (int64_t start = 0; start < gemm.batch; start += step) {
    const int64_t count = std::min(step, gemm.batch - start);
    auto target = count == 1 ? out[start] : out.narrow(0, start, count);
    if (count == 1) {
      accumulate ? target.addmm_(left[start], right[start]) : at::mm_out(target, left[start], right[start]);
    } else if (accumulate) {
      target.baddbmm_(left.narrow(0, start, count), right.narrow(0, start, count));
    } else {
      at::bmm_out(target, left.narrow(0, start, count), right.narrow(0, start, count));
    }
  }
}

/// Writes `bias` into the columns of C, for libraries that then add to it.
void fill_columns(const Gemm& gemm, c10::ScalarType dtype, const void* bias, void* c) {
  const auto row = at::from_blob(const_cast<void*>(bias), {gemm.batch, 1, gemm.m}, at::TensorOptions().dtype(dtype));
  row_major(c, gemm, gemm.c, gemm.n, gemm.m, dtype).copy_(row);
}

/// Whether the products of a block are so many that torch's GEMM earns the calls and copies that it costs.
bool is_large(const Gemm& gemm) {
  return gemm.m * gemm.n * gemm.k >= int64_t{1} << 21;
}

} // namespace

void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, const void* bias) {
  const auto run_kernel = [&]<typename T>(Kernel<T> kernel) {
    kernel(gemm, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), static_cast<const T*>(bias));
  };
  if (dtype == at::kFloat && choice().float32 != nullptr) {
    return run_kernel(choice().float32);
  }
  if (dtype == at::kBFloat16 && choice().bfloat16 != nullptr && !(choice().native_bfloat16 && is_large(gemm))) {
    return run_kernel(choice().bfloat16);
  }
  if (dtype == at::kHalf && choice().float16 != nullptr && !(choice().native_float16 && is_large(gemm))) {
    return run_kernel(choice().float16);
  }

  const bool accumulate = bias != nullptr;
  if (accumulate) {
    fill_columns(gemm, dtype, bias, c);
  }
  const auto run_mkl = [&]<typename T>(MklGemmBatch gemm_batch, T /*zero*/) {
    mkl_gemm(gemm_batch, gemm, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), accumulate);
  };
  if (!mkl().available() || dtype == at::kHalf || dtype == at::kBFloat16) {
    aten_gemm(gemm, dtype, a, b, c, accumulate);
  } else if (dtype == at::kFloat) {
    run_mkl(mkl().s, 0.F);
  } else if (dtype == at::kDouble) {
    run_mkl(mkl().d, 0.0);
  } else if (dtype == at::kComplexFloat) {
    run_mkl(mkl().c, c10::complex<float>());
  } else {
    run_mkl(mkl().z, c10::complex<double>());
  }
}

std::string gemm_library() {
  const std::string library = mkl().available() ? "mkl" : "aten";
  if (choice().float32 == nullptr) {
    return library;
  }
  const bool native = choice().native_bfloat16 || choice().native_float16;
  return choice().name + (native ? ", aten for large blocks of half types, and " : " and ") + library;
}

} // namespace blockdiag::cpu
