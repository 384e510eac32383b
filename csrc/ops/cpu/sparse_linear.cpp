#include "ops/sparse_linear.h"
#include "cpu/backend.h"
#include "ops/check.h"

#include <ATen/ops/empty.h>
#include <c10/util/DimVector.h>
#include <torch/library.h>

namespace blockdiag::cpu {
namespace {

/// An index as kernels read it.
struct Index {
  at::Tensor row_offsets, cols;

  Index(const char* op, const at::Tensor& crow_indices, const at::Tensor& col_indices, const SparseLinearSizes& sizes)
      : row_offsets(crow_indices.contiguous()), cols(col_indices.contiguous()) {
    check_block_indices(op, row_offsets, cols, sizes.block_cols.expect_int());
    row_offsets = row_offsets.to(at::kInt);
    cols = cols.to(at::kInt);
  }
};

/// An activation whose rows are contiguous, `ld` apart.
struct Rows {
  at::Tensor tensor;
  int64_t ld;

  explicit Rows(const at::Tensor& activation) : tensor(activation), ld(activation.size(-1)) {
    const bool in_place = activation.dim() == 2 && activation.stride(1) == 1 && activation.stride(0) >= ld;
    if (in_place) {
      ld = activation.stride(0);
    } else {
      tensor = activation.contiguous();
    }
  }
};

at::Tensor compute(
    SparsePass pass, const SparseLinearSizes& sizes, const Index& index, c10::SymIntArrayRef result_sizes,
    const at::TensorOptions& options, SparseOperands operands
) {
  auto result = at::empty(C10_AS_INTARRAYREF_SLOW(result_sizes), options);
  const SparseProblem problem{
      .pass = pass,
      .dtype = dtype_of(result),
      .batch = sizes.batch.expect_int(),
      .matrix = {
          .block_rows = sizes.block_rows.expect_int(),
          .block_cols = sizes.block_cols.expect_int(),
          .out_block = sizes.out_block.expect_int(),
          .in_block = sizes.in_block.expect_int(),
          .num_blocks = sizes.num_blocks.expect_int()
      },
  };
  if (result.numel() == 0) {
    return result;
  }
  if (problem.batch == 0 || problem.matrix.block_rows == 0) { // a sum of nothing
    return result.zero_();
  }
  operands.row_offsets = index.row_offsets.const_data_ptr<int32_t>();
  operands.cols = index.cols.const_data_ptr<int32_t>();
  operands.result = result.mutable_data_ptr();
  const bool done = backend().run_sparse(problem, operands);
  TORCH_INTERNAL_ASSERT(done, "the last provider takes every product");
  return result;
}

at::Tensor sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  const auto sizes = check_sparse_linear(input, values, crow_indices, col_indices, bias, diagonal);
  const Index index("blockdiag::sparse_linear", crow_indices, col_indices, sizes);
  const Rows rows(input);
  const auto blocks = values.contiguous();
  const auto added = bias ? bias->contiguous() : at::Tensor();
  const auto factors = diagonal ? diagonal->contiguous() : at::Tensor();
  return compute(
      SparsePass::kOutput, sizes, index, sizes.output, input.options(),
      {.values = blocks.const_data_ptr(),
       .input = rows.tensor.const_data_ptr(),
       .input_ld = rows.ld,
       .bias = added.defined() ? added.const_data_ptr() : nullptr,
       .diagonal = factors.defined() ? factors.const_data_ptr() : nullptr}
  );
}

at::Tensor sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
) {
  const auto sizes = check_sparse_linear_input_grad(grad_output, values, crow_indices, col_indices, input_sizes);
  const Index index("blockdiag::sparse_linear_input_grad", crow_indices, col_indices, sizes);
  const Rows rows(grad_output);
  const auto blocks = values.contiguous();
  return compute(
      SparsePass::kInputGrad, sizes, index, input_sizes, grad_output.options(),
      {.values = blocks.const_data_ptr(), .grad_output = rows.tensor.const_data_ptr(), .grad_output_ld = rows.ld}
  );
}

at::Tensor sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
) {
  const auto sizes = check_sparse_linear_values_grad(grad_output, input, crow_indices, col_indices, values_sizes);
  const Index index("blockdiag::sparse_linear_values_grad", crow_indices, col_indices, sizes);
  const Rows grads(grad_output), rows(input);
  return compute(
      SparsePass::kValuesGrad, sizes, index, values_sizes, grad_output.options(),
      {.input = rows.tensor.const_data_ptr(),
       .input_ld = rows.ld,
       .grad_output = grads.tensor.const_data_ptr(),
       .grad_output_ld = grads.ld}
  );
}

} // namespace
} // namespace blockdiag::cpu

TORCH_LIBRARY_IMPL(blockdiag, CPU, m) {
  m.impl("sparse_linear", TORCH_FN(blockdiag::cpu::sparse_linear));
  m.impl("sparse_linear_input_grad", TORCH_FN(blockdiag::cpu::sparse_linear_input_grad));
  m.impl("sparse_linear_values_grad", TORCH_FN(blockdiag::cpu::sparse_linear_values_grad));
}
