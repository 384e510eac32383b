// The GEMM description against an interpreter of BLAS's documentation, over random shapes and strides. No torch.
#include "problem/gemm.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

namespace {

using blockdiag::Blocks;
using blockdiag::Gemm;
using blockdiag::Operand;

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

/// Element (i, j) of op(matrix), column-major, as the BLAS reference defines it: op(A)(i, j) is A(i, j) or A(j, i), and
/// A(i, j) is at i + j * ld.
int64_t blas_offset(const Operand& operand, int64_t block, int64_t i, int64_t j) {
  return block * operand.stride + (operand.transpose ? j + i * operand.ld : i + j * operand.ld);
}

/// ?gemm of the BLAS reference (https://www.netlib.org/blas/), block by block, with its conditions on the arguments.
void interpret(
    const Gemm& gemm, const std::vector<double>& a, const std::vector<double>& b, std::vector<double>& c, double beta
) {
  require(gemm.a.ld >= std::max<int64_t>(1, gemm.a.transpose ? gemm.k : gemm.m), "lda reaches past a column");
  require(gemm.b.ld >= std::max<int64_t>(1, gemm.b.transpose ? gemm.n : gemm.k), "ldb reaches past a column");
  require(!gemm.c.transpose && gemm.c.ld >= std::max<int64_t>(1, gemm.m), "ldc reaches past a column");
  for (const auto& operand : {gemm.a, gemm.b, gemm.c}) {
    require(operand.ld <= blockdiag::kBlasMax, "leading dimensions fit 32 bits");
  }
  for (int64_t g = 0; g < gemm.batch; ++g) {
    for (int64_t i = 0; i < gemm.m; ++i) {
      for (int64_t j = 0; j < gemm.n; ++j) {
        double sum = 0;
        for (int64_t l = 0; l < gemm.k; ++l) {
          sum += a.at(blas_offset(gemm.a, g, i, l)) * b.at(blas_offset(gemm.b, g, l, j));
        }
        double& element = c.at(blas_offset(gemm.c, g, i, j));
        element = sum + (beta == 0 ? 0 : beta * element);
      }
    }
  }
}

int64_t offset(const Blocks& blocks, int64_t g, int64_t i, int64_t j) {
  return g * blocks.block_stride + i * blocks.row_stride + j * blocks.col_stride;
}

/// One more than the largest offset that the matrices reach.
int64_t extent(const Blocks& blocks, int64_t num_blocks) {
  return offset(blocks, num_blocks - 1, blocks.rows - 1, blocks.cols - 1) + 1;
}

class Random {
 public:
  int64_t below(int64_t bound) { return std::uniform_int_distribution<int64_t>(0, bound - 1)(generator_); }

  std::vector<double> numbers(int64_t count) {
    std::vector<double> values(count);
    for (auto& value : values) {
      value = std::uniform_real_distribution<double>(-1, 1)(generator_);
    }
    return values;
  }

  /// Matrices in a layout that tensors have: rows or columns innermost; blocks side by side in each row, stacked, or
  /// shared (stride 0); with or without gaps. The stride of a dimension of one element is arbitrary.
  Blocks layout(int64_t rows, int64_t cols, int64_t num_blocks) {
    const int64_t inner = cols + below(3);
    Blocks blocks{rows, cols, 0, 1, 0};
    switch (below(3)) {
      case 0: // (rows, num_blocks, cols)
        blocks.block_stride = inner;
        blocks.row_stride = num_blocks * inner + below(3);
        break;
      case 1: // (num_blocks, rows, cols)
        blocks.row_stride = inner;
        blocks.block_stride = rows * inner + below(3);
        break;
      default: // (rows, cols), shared
        blocks.row_stride = inner;
        break;
    }
    if (rows == 1 && below(2) == 0) {
      blocks.row_stride = below(100);
    }
    if (cols == 1 && below(2) == 0) {
      blocks.col_stride = below(100);
    }
    return blocks;
  }

  Blocks layout_or_transposed(int64_t rows, int64_t cols, int64_t num_blocks) {
    return below(2) == 0 ? layout(rows, cols, num_blocks) : layout(cols, rows, num_blocks).transposed();
  }

 private:
  std::mt19937_64 generator_{0};
};

/// Interpreting the description gives the product of the stored matrices.
void test_products(Random& random) {
  for (int trial = 0; trial < 20000; ++trial) {
    const int64_t rows = 1 + random.below(6), cols = 1 + random.below(6), inner = 1 + random.below(6);
    const int64_t num_blocks = 1 + random.below(4);
    const auto left = random.layout_or_transposed(rows, inner, num_blocks);
    const auto right = random.layout_or_transposed(inner, cols, num_blocks);
    auto out = random.layout(rows, cols, num_blocks);
    if (out.block_stride == 0) {
      out.block_stride = rows * out.row_stride + cols; // results are not shared
    }
    const auto gemm = blockdiag::describe_product(left, right, out, num_blocks);
    const auto a = random.numbers(extent(right, num_blocks)), b = random.numbers(extent(left, num_blocks));
    const auto before = random.numbers(extent(out, num_blocks));
    const double beta = static_cast<double>(random.below(2));

    auto expected = before;
    for (int64_t g = 0; g < num_blocks; ++g) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < cols; ++j) {
          double sum = 0;
          for (int64_t l = 0; l < inner; ++l) {
            sum += b.at(offset(left, g, i, l)) * a.at(offset(right, g, l, j));
          }
          double& element = expected.at(offset(out, g, i, j));
          element = sum + beta * element;
        }
      }
    }
    auto actual = before;
    interpret(gemm, a, b, actual, beta);
    require(actual == expected, "the described GEMM is the product, and writes nothing else");
  }
}

/// transposed_operand gives nothing exactly where no (op, ld) of BLAS reaches the same elements.
void test_addressability(Random& random) {
  int64_t addressable = 0, refused = 0;
  for (int trial = 0; trial < 200000; ++trial) {
    const Blocks blocks{1 + random.below(4), 1 + random.below(4), random.below(7), random.below(7), random.below(9)};
    const auto reaches_same = [&](const Operand& operand) {
      for (int64_t i = 0; i < blocks.rows; ++i) {
        for (int64_t j = 0; j < blocks.cols; ++j) {
          if (blas_offset(operand, 1, j, i) != offset(blocks, 1, i, j)) {
            return false;
          }
        }
      }
      return true;
    };
    bool possible = false;
    for (int64_t ld = 1; ld < 7; ++ld) {
      possible = possible || (ld >= blocks.cols && reaches_same({false, ld, blocks.block_stride})) ||
                 (ld >= blocks.rows && reaches_same({true, ld, blocks.block_stride}));
    }
    const auto operand = blockdiag::transposed_operand(blocks);
    require(operand.has_value() == possible, "addressable exactly if some op and leading dimension reach it");
    require(!operand || reaches_same(*operand), "the operand reaches the matrix's elements");
    ++(operand ? addressable : refused);
  }
  require(addressable > 1000 && refused > 1000, "both outcomes are tried");
}

void test_limits() {
  const int64_t limit = blockdiag::kBlasMax;
  require(blockdiag::transposed_operand({2, 3, limit, 1, 0}).has_value(), "the largest leading dimension");
  require(!blockdiag::transposed_operand({2, 3, limit + 1, 1, 0}).has_value(), "one more does not fit 32 bits");
  const auto far = blockdiag::transposed_operand({2, 3, 3, 1, limit * 1000});
  require(far && far->stride == limit * 1000, "the stride from block to block has 64 bits");
}

void test_nothing_to_do() {
  for (int zero = 0; zero < 4; ++zero) {
    const int64_t rows = zero != 0, cols = zero != 1, inner = zero != 2, num_blocks = zero != 3;
    // Strides of empty tensors are arbitrary, and would be rejected.
    const Blocks left{rows, inner, 0, 0, 0}, right{inner, cols, 0, 0, 0}, out{rows, cols, 0, 0, 0};
    const auto gemm = blockdiag::describe_product(left, right, out, num_blocks);
    require(gemm.m == cols && gemm.n == rows && gemm.k == inner && gemm.batch == num_blocks, "sizes are kept");
  }
}

} // namespace

int main() {
  Random random;
  test_products(random);
  test_addressability(random);
  test_limits();
  test_nothing_to_do();
  std::puts("all passed");
}
