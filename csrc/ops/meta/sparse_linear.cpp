#include "ops/sparse_linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace blockdiag::meta {
namespace {

at::Tensor sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  const auto sizes = check_sparse_linear(input, values, crow_indices, col_indices, bias, diagonal);
  return at::empty_symint(sizes.output, input.options());
}

at::Tensor sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
) {
  check_sparse_linear_input_grad(grad_output, values, crow_indices, col_indices, input_sizes);
  return at::empty_symint(input_sizes, grad_output.options());
}

at::Tensor sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
) {
  check_sparse_linear_values_grad(grad_output, input, crow_indices, col_indices, values_sizes);
  return at::empty_symint(values_sizes, grad_output.options());
}

} // namespace
} // namespace blockdiag::meta

TORCH_LIBRARY_IMPL(blockdiag, Meta, m) {
  m.impl("sparse_linear", TORCH_FN(blockdiag::meta::sparse_linear));
  m.impl("sparse_linear_input_grad", TORCH_FN(blockdiag::meta::sparse_linear_input_grad));
  m.impl("sparse_linear_values_grad", TORCH_FN(blockdiag::meta::sparse_linear_values_grad));
}
