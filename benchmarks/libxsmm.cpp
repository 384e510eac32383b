// A product for each block by a kernel of libxsmm.
#include <libxsmm.h>

#include <algorithm>
#include <cstdint>

namespace {

/// c = a b for each block, in column-major matrices: c of m x n, a of m x k, b of k x n, or transposed n x k. All are
/// divided into tiles, of which each is a call of the kernel.
struct Product {
  int64_t blocks, m, n, k;
  int64_t tile_m, tile_n, tile_k;
  int64_t lda, a_block, a_m, a_k; // between columns, between blocks, and between tiles
  int64_t ldb, b_block, b_n, b_k;
  int64_t ldc, c_block;
  int64_t transposed_b;
  libxsmm_smmfunction store, add; // the kernels of c = a b, and of c += a b
};

libxsmm_smmfunction dispatch(const Product& p, float beta) {
  const libxsmm_blasint lda = p.lda, ldb = p.ldb, ldc = p.ldc;
  const float alpha = 1;
  const int flags = p.transposed_b ? LIBXSMM_GEMM_FLAG_TRANS_B : LIBXSMM_GEMM_FLAG_NONE;
  const int prefetch = LIBXSMM_PREFETCH_NONE;
  return libxsmm_smmdispatch(p.tile_m, p.tile_n, p.tile_k, &lda, &ldb, &ldc, &alpha, &beta, &flags, &prefetch);
}

} // namespace

/// Sets the kernels. False if libxsmm has none.
extern "C" bool prepare(Product* product) {
  product->store = dispatch(*product, 0);
  product->add = dispatch(*product, 1);
  return product->store != nullptr && product->add != nullptr;
}

/// `bias`, if not null, has m elements for each block, which are added to each column of c.
extern "C" void compute(const Product* product, const float* a, const float* b, float* c, const float* bias) {
  const Product& p = *product;
  const int64_t tiles_m = p.m / p.tile_m, tiles_n = p.n / p.tile_n, tiles_k = p.k / p.tile_k;
  const auto compute_tile = [&](int64_t block, int64_t m, int64_t n, int64_t k) {
    float* const c_tile = c + block * p.c_block + m * p.tile_m + n * p.tile_n * p.ldc;
    if (k == 0 && bias != nullptr) {
      for (int64_t column = 0; column < p.tile_n; ++column) {
        std::copy_n(bias + block * p.m + m * p.tile_m, p.tile_m, c_tile + column * p.ldc);
      }
    }
    const auto kernel = k == 0 && bias == nullptr ? p.store : p.add;
    kernel(a + block * p.a_block + m * p.a_m + k * p.a_k, b + block * p.b_block + n * p.b_n + k * p.b_k, c_tile);
  };
  // Outermost the rows of the batch, which all blocks share. With a transposed b, the product is a sum over them.
  for (int64_t rows = 0; rows < (p.transposed_b ? tiles_k : tiles_n); ++rows) {
    for (int64_t block = 0; block < p.blocks; ++block) {
      for (int64_t outer = 0; outer < (p.transposed_b ? tiles_n : tiles_m); ++outer) {
        for (int64_t inner = 0; inner < (p.transposed_b ? tiles_m : tiles_k); ++inner) {
          p.transposed_b ? compute_tile(block, inner, outer, rows) : compute_tile(block, outer, rows, inner);
        }
      }
    }
  }
}
