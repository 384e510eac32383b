// Block-sparse products in plain loops.
#include "backend.h"

#include "scalar_type.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace blockdiag::cpu {
namespace {

/// `Sum`: float for half types, or else T.
template <typename T, typename Sum>
void run(const SparseProblem& problem, const SparseOperands& operands) {
  const auto& matrix = problem.matrix;
  const auto* const values = static_cast<const T*>(operands.values);
  const auto* const bias = static_cast<const T*>(operands.bias);
  const auto* const diagonal = static_cast<const T*>(operands.diagonal);
  const auto input_row = [&](int64_t i) { return static_cast<const T*>(operands.input) + i * operands.input_ld; };
  const auto grad_row = [&](int64_t i) {
    return static_cast<const T*>(operands.grad_output) + i * operands.grad_output_ld;
  };
  const auto value_at = [&](int64_t block, int64_t n, int64_t k) {
    return static_cast<Sum>(values[(block * matrix.out_block + n) * matrix.in_block + k]);
  };
  const auto result_row = [&](int64_t i, int64_t features) { return static_cast<T*>(operands.result) + i * features; };
  const auto for_each_block = [&](int64_t row, const auto& function) {
    for (int32_t block = operands.row_offsets[row]; block < operands.row_offsets[row + 1]; ++block) {
      function(block, operands.cols[block] * matrix.in_block);
    }
  };
  const auto for_each_row = [&](int64_t count, const auto& function) {
    constexpr int64_t kThreadProducts = 1 << 16; // worth waking a thread for
    const int64_t products = problem.batch * matrix.num_blocks * matrix.block_size();
    const int64_t grain = std::max<int64_t>(kThreadProducts * count / std::max<int64_t>(products, 1), 1);
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        function(row);
      }
    });
  };
  switch (problem.pass) {
    case SparsePass::kOutput:
      return for_each_row(problem.batch, [&](int64_t i) {
        const T* const x = input_row(i);
        T* const y = result_row(i, matrix.out_features());
        for (int64_t f = 0; f < matrix.out_features(); ++f) {
          Sum sum = 0;
          for_each_block(f / matrix.out_block, [&](int64_t block, int64_t first) {
            for (int64_t k = 0; k < matrix.in_block; ++k) {
              sum += value_at(block, f % matrix.out_block, k) * static_cast<Sum>(x[first + k]);
            }
          });
          sum += bias == nullptr ? Sum(0) : static_cast<Sum>(bias[f]);
          sum += diagonal == nullptr ? Sum(0)
                                     : static_cast<Sum>(diagonal[f]) * static_cast<Sum>(x[f % matrix.in_features()]);
          y[f] = static_cast<T>(sum);
        }
      });
    case SparsePass::kInputGrad:
      return for_each_row(problem.batch, [&](int64_t i) {
        std::vector<Sum> sums(matrix.in_features(), Sum(0));
        for (int64_t f = 0; f < matrix.out_features(); ++f) {
          const auto grad = static_cast<Sum>(grad_row(i)[f]);
          for_each_block(f / matrix.out_block, [&](int64_t block, int64_t first) {
            for (int64_t k = 0; k < matrix.in_block; ++k) {
              sums[first + k] += grad * value_at(block, f % matrix.out_block, k);
            }
          });
        }
        std::transform(sums.begin(), sums.end(), result_row(i, matrix.in_features()), [](const Sum& sum) {
          return static_cast<T>(sum);
        });
      });
    case SparsePass::kValuesGrad:
      return for_each_row(matrix.block_rows, [&](int64_t row) {
        std::vector<Sum> sums(matrix.block_size());
        for_each_block(row, [&](int64_t block, int64_t first) {
          std::fill(sums.begin(), sums.end(), Sum(0));
          for (int64_t i = 0; i < problem.batch; ++i) {
            for (int64_t e = 0; e < matrix.block_size(); ++e) {
              const auto grad = static_cast<Sum>(grad_row(i)[row * matrix.out_block + e / matrix.in_block]);
              sums[e] += grad * static_cast<Sum>(input_row(i)[first + e % matrix.in_block]);
            }
          }
          std::transform(sums.begin(), sums.end(), result_row(block, matrix.block_size()), [](const Sum& sum) {
            return static_cast<T>(sum);
          });
        });
      });
  }
}

} // namespace

bool portable_sparse(const SparseProblem& problem, const SparseOperands& operands) {
  AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES_AND2(
      at::kHalf, at::kBFloat16, scalar_type_of(problem.dtype), "blockdiag::sparse_linear",
      [&] { run<scalar_t, at::opmath_type<scalar_t>>(problem, operands); }
  );
  return true;
}

} // namespace blockdiag::cpu
