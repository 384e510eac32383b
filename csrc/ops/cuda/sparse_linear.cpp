// Block-sparse products on a GPU: through the dense weight. Nothing is gained there but the memory of parameters and
// optimizer states.
#include "ops/sparse_linear.h"

#include <ATen/TensorIndexing.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace blockdiag::cuda {
namespace {

using at::indexing::TensorIndex;

/// The row and the column of each block. Indices out of range fail on the device, as all of torch's do.
std::vector<TensorIndex> positions(
    const at::Tensor& crow_indices, const at::Tensor& col_indices, const SparseLinearSizes& sizes
) {
  const auto rows = at::arange(sizes.block_rows.expect_int(), crow_indices.options().dtype(at::kLong));
  const auto counts = crow_indices.diff().to(at::kLong);
  return {rows.repeat_interleave(counts, 0, sizes.num_blocks.expect_int()), col_indices.to(at::kLong)};
}

at::Tensor dense_weight(
    const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const SparseLinearSizes& sizes
) {
  TORCH_WARN_ONCE(
      "blockdiag::sparse_linear computes with the dense weight on a GPU: it is not faster there than a dense layer"
  );
  const auto rows = sizes.block_rows.expect_int(), cols = sizes.block_cols.expect_int();
  auto blocks = at::zeros({rows, cols, values.size(1), values.size(2)}, values.options());
  blocks.index_put_(positions(crow_indices, col_indices, sizes), values);
  return blocks.transpose(1, 2).reshape({rows * values.size(1), cols * values.size(2)});
}

at::Tensor sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  const auto sizes = check_sparse_linear(input, values, crow_indices, col_indices, bias, diagonal);
  const c10::DeviceGuard guard(input.device());
  const auto output = at::linear(input, dense_weight(values, crow_indices, col_indices, sizes), bias);
  if (!diagonal || output.numel() == 0) {
    return output.contiguous();
  }
  const auto each = std::vector<int64_t>{output.size(-1) / input.size(-1), input.size(-1)};
  return at::addcmul(output.unflatten(-1, each), input.unsqueeze(-2), diagonal->unflatten(-1, each)).flatten(-2);
}

at::Tensor sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
) {
  const auto sizes = check_sparse_linear_input_grad(grad_output, values, crow_indices, col_indices, input_sizes);
  const c10::DeviceGuard guard(grad_output.device());
  return at::matmul(grad_output, dense_weight(values, crow_indices, col_indices, sizes)).contiguous();
}

at::Tensor sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
) {
  const auto sizes = check_sparse_linear_values_grad(grad_output, input, crow_indices, col_indices, values_sizes);
  const c10::DeviceGuard guard(grad_output.device());
  const auto batch = sizes.batch.expect_int();
  const auto matrix = [&](const at::Tensor& rows) { return rows.reshape({batch, rows.size(-1)}); };
  const auto rows = sizes.block_rows.expect_int(), cols = sizes.block_cols.expect_int();
  const auto grads = at::matmul(matrix(grad_output).t(), matrix(input));
  const auto blocks = grads.view({rows, sizes.out_block.expect_int(), cols, sizes.in_block.expect_int()});
  return blocks.transpose(1, 2).index(positions(crow_indices, col_indices, sizes)).contiguous();
}

} // namespace
} // namespace blockdiag::cuda

TORCH_LIBRARY_IMPL(blockdiag, CUDA, m) {
  m.impl("sparse_linear", TORCH_FN(blockdiag::cuda::sparse_linear));
  m.impl("sparse_linear_input_grad", TORCH_FN(blockdiag::cuda::sparse_linear_input_grad));
  m.impl("sparse_linear_values_grad", TORCH_FN(blockdiag::cuda::sparse_linear_values_grad));
}
