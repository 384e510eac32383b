#include "gemm.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/util/SmallVector.h>
#include <c10/util/complex.h>
#include <c10/util/env.h>

#include <algorithm>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace blockdiag::cpu {
namespace {

// ---- MKL's batched GEMM ------------------------------------------------------------------------------------------------
//
// torch's x86 builds carry MKL. Its batched GEMM takes the blocks where they lie, but torch calls it on contiguous batches
// only, and a link against it would break on torch builds with another BLAS: so it is looked up when we are loaded.

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
    if (!at::globalContext().hasMKL() || c10::utils::get_env("BLOCKDIAG_CPU_GEMM") == "aten") {
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

// ---- float16 and bfloat16 ----------------------------------------------------------------------------------------------

/// Whether this CPU multiplies matrices of a half type, and torch's GEMM of them is worth calling.
bool has_native_gemm(c10::ScalarType dtype) {
  static const auto capabilities = at::cpu::get_cpu_capabilities();
  const auto has = [](const char* name) {
    const auto found = capabilities.find(name);
    return found != capabilities.end() && found->second.isBool() && found->second.toBool();
  };
  static const bool bfloat16 = has("avx512_bf16") || has("amx_bf16");
  static const bool float16 = has("avx512_fp16") || has("amx_fp16");
  return at::globalContext().hasMKLDNN() && (dtype == at::kBFloat16 ? bfloat16 : float16);
}

constexpr int64_t kTile = 256; // rows and columns

/// Computes half types through float32, tile by tile, so that the float32 copies stay in the cache: where the CPU does not
/// multiply them itself, torch's GEMM of them is an order of magnitude slower.
void gemm_through_float(
    const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate
) {
  const auto left = row_major(b, gemm, gemm.b, gemm.n, gemm.k, dtype);
  const auto right = row_major(a, gemm, gemm.a, gemm.k, gemm.m, dtype);
  const auto out = row_major(c, gemm, gemm.c, gemm.n, gemm.m, dtype);
  const int64_t m_tiles = (gemm.m + kTile - 1) / kTile;
  const int64_t n_tiles = (gemm.n + kTile - 1) / kTile;
  const auto tile_size = [](int64_t start, int64_t end) { return std::min(kTile, end - start); };

  at::parallel_for(0, gemm.batch * n_tiles * m_tiles, 1, [&](int64_t begin, int64_t end) {
    const int64_t m_max = tile_size(0, gemm.m), n_max = tile_size(0, gemm.n), k_max = tile_size(0, gemm.k);
    const auto scratch = at::empty({m_max * k_max + n_max * k_max + m_max * n_max}, at::kFloat);
    float* const a_tile = scratch.mutable_data_ptr<float>();
    float* const b_tile = a_tile + m_max * k_max;
    float* const c_tile = b_tile + n_max * k_max;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / (n_tiles * m_tiles);
      const int64_t n0 = task / m_tiles % n_tiles * kTile, n = tile_size(n0, gemm.n);
      const int64_t m0 = task % m_tiles * kTile, m = tile_size(m0, gemm.m);
      const auto out_tile = out[block].narrow(0, n0, n).narrow(1, m0, m);
      auto c_float = at::from_blob(c_tile, {n, m}, at::kFloat);
      if (accumulate) {
        c_float.copy_(out_tile);
      }
      for (int64_t k0 = 0; k0 < gemm.k; k0 += kTile) {
        const int64_t k = tile_size(k0, gemm.k);
        at::from_blob(b_tile, {n, k}, at::kFloat).copy_(left[block].narrow(0, n0, n).narrow(1, k0, k));
        at::from_blob(a_tile, {k, m}, at::kFloat).copy_(right[block].narrow(0, k0, k).narrow(1, m0, m));
        const Gemm tile{.m = m, .n = n, .k = k, .batch = 1, .a = {false, m, 0}, .b = {false, k, 0}, .c = {false, m, 0}};
        run_gemm(tile, at::kFloat, a_tile, b_tile, c_tile, accumulate || k0 > 0);
      }
      out_tile.copy_(c_float);
    }
  });
}

} // namespace

void run_gemm(const Gemm& gemm, c10::ScalarType dtype, const void* a, const void* b, void* c, bool accumulate) {
  const auto run_mkl = [&]<typename T>(MklGemmBatch gemm_batch, T /*zero*/) {
    mkl_gemm(gemm_batch, gemm, static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(c), accumulate);
  };
  const bool half = dtype == at::kHalf || dtype == at::kBFloat16;
  if (half && !has_native_gemm(dtype)) {
    gemm_through_float(gemm, dtype, a, b, c, accumulate);
  } else if (half || !mkl().available()) {
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

const char* gemm_library() {
  return mkl().available() ? "mkl" : "aten";
}

} // namespace blockdiag::cpu
