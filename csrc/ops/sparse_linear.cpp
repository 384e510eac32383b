#include "sparse_linear.h"

#include "check.h"
#include "problem/sparse.h"

#include <ATen/Dispatch.h>
#include <c10/util/Exception.h>

#include <string>

namespace blockdiag {
namespace {

SparseLinearSizes check_sizes(
    const char* op, c10::SymIntArrayRef input, c10::SymIntArrayRef values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices
) {
  TORCH_CHECK(
      values.size() == 3, op, ": expected values to have 3 dimensions (blocks, out_block, in_block), but got shape ",
      values
  );
  TORCH_CHECK(!input.empty(), op, ": expected input to have at least 1 dimension, but got a scalar");
  SparseLinearSizes sizes{1, 0, 0, values[1], values[2], values[0], {}};
  auto& [batch, block_rows, block_cols, out_block, in_block, num_blocks, output] = sizes;
  TORCH_SYM_CHECK(
      out_block.sym_gt(0).sym_and(in_block.sym_gt(0)), op, ": expected blocks to be of at least 1 x 1, but got ",
      out_block, " x ", in_block
  );
  for (const auto& [name, tensor] : {NamedTensor("crow_indices", &crow_indices), {"col_indices", &col_indices}}) {
    const auto dtype = tensor->scalar_type();
    TORCH_CHECK(
        dtype == at::kInt || dtype == at::kLong, op, ": expected ", name, " to be int32 or int64, but got ",
        c10::getDtypeNames(dtype).first
    );
    TORCH_CHECK(
        tensor->dim() == 1, op, ": expected ", name, " to have 1 dimension, but got shape ", tensor->sym_sizes()
    );
  }
  TORCH_CHECK(
      crow_indices.scalar_type() == col_indices.scalar_type(), op,
      ": expected col_indices to have crow_indices' dtype ", c10::getDtypeNames(crow_indices.scalar_type()).first,
      ", but got ", c10::getDtypeNames(col_indices.scalar_type()).first
  );
  TORCH_SYM_CHECK(
      crow_indices.sym_size(0).sym_gt(0), op,
      ": expected crow_indices to have 1 element more than there are rows of "
      "blocks, but got none"
  );
  TORCH_SYM_CHECK(
      col_indices.sym_size(0).sym_eq(num_blocks), op, ": expected col_indices to have an element for each of values' ",
      num_blocks, " blocks, but got ", col_indices.sym_size(0)
  );
  block_rows = crow_indices.sym_size(0) - 1;
  const auto& in_features = input.back();
  TORCH_SYM_CHECK(
      (in_features % in_block).sym_eq(0), op,
      ": expected input's last dimension to be a multiple of in_block = ", in_block, ", but got ", in_features
  );
  block_cols = in_features / in_block;
  check_fits_blas(op, "in_block", in_block);
  check_fits_blas(op, "out_block", out_block);
  check_fits_blas(op, "in_features", in_features);
  check_fits_blas(op, "the number of rows of blocks", block_rows);
  check_fits_blas(op, "out_features (rows of blocks * out_block)", block_rows * out_block);
  check_fits_blas(op, "the number of blocks", num_blocks);
  for (const auto& size : input.slice(0, input.size() - 1)) {
    check_fits_blas(op, "the batch size (the product of input's leading dimensions)", size);
    batch *= size;
    check_fits_blas(op, "the batch size (the product of input's leading dimensions)", batch);
    output.push_back(size);
  }
  output.push_back(block_rows * out_block);
  return sizes;
}

void check_index_devices(
    const char* op, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices
) {
  for (const auto& [name, tensor] : {NamedTensor("crow_indices", &crow_indices), {"col_indices", &col_indices}}) {
    TORCH_CHECK(
        tensor->device() == values.device(), op, ": expected ", name, " to be on the device ", values.device(),
        " of the other tensors, but got ", tensor->device()
    );
  }
}

void check_vector(const char* op, const char* name, const at::Tensor& vector, const c10::SymInt& features) {
  TORCH_CHECK(
      vector.dim() == 1 && vector.sym_size(0) == features, op, ": expected ", name, " to have shape (", features,
      ",), but got ", vector.sym_sizes()
  );
}

void check_grad_output(const char* op, const at::Tensor& grad_output, const SparseLinearSizes& sizes) {
  TORCH_CHECK(
      grad_output.sym_sizes() == c10::SymIntArrayRef(sizes.output), op,
      ": expected grad_output to have the output's shape ", c10::SymIntArrayRef(sizes.output), ", but got ",
      grad_output.sym_sizes()
  );
}

} // namespace

SparseLinearSizes check_sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  constexpr const char* op = "blockdiag::sparse_linear";
  auto sizes = check_sizes(op, input.sym_sizes(), values.sym_sizes(), crow_indices, col_indices);
  check_dtypes_and_devices(op, {{"input", &input}, {"values", &values}});
  check_index_devices(op, values, crow_indices, col_indices);
  const auto& out_features = sizes.output.back();
  if (bias) {
    check_vector(op, "bias", *bias, out_features);
    check_dtypes_and_devices(op, {{"input", &input}, {"bias", &*bias}});
  }
  if (diagonal) {
    const auto& in_features = input.sym_sizes().back();
    TORCH_SYM_CHECK(
        (out_features % in_features.max(1)).sym_eq(0).sym_and(in_features.sym_gt(0).sym_or(out_features.sym_eq(0))), op,
        ": expected output features to be a multiple of the input features beside a diagonal, but got ", out_features,
        " and ", in_features
    );
    check_vector(op, "diagonal", *diagonal, out_features);
    check_dtypes_and_devices(op, {{"input", &input}, {"diagonal", &*diagonal}});
  }
  return sizes;
}

SparseLinearSizes check_sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
) {
  constexpr const char* op = "blockdiag::sparse_linear_input_grad";
  auto sizes = check_sizes(op, input_sizes, values.sym_sizes(), crow_indices, col_indices);
  check_grad_output(op, grad_output, sizes);
  check_dtypes_and_devices(op, {{"grad_output", &grad_output}, {"values", &values}});
  check_index_devices(op, values, crow_indices, col_indices);
  return sizes;
}

SparseLinearSizes check_sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
) {
  constexpr const char* op = "blockdiag::sparse_linear_values_grad";
  auto sizes = check_sizes(op, input.sym_sizes(), values_sizes, crow_indices, col_indices);
  check_grad_output(op, grad_output, sizes);
  check_dtypes_and_devices(op, {{"grad_output", &grad_output}, {"input", &input}});
  check_index_devices(op, input, crow_indices, col_indices);
  return sizes;
}

namespace {

/// What is wrong with the indices; empty if nothing is.
template <typename Index>
std::string find_fault(const Index* offsets, int64_t rows, const Index* cols, int64_t num_blocks, int64_t block_cols) {
  const auto text = [](auto number) { return std::to_string(number); };
  if (offsets[0] != 0 || offsets[rows] != num_blocks) {
    return "crow_indices to begin with 0 and to end with the number of blocks, " + text(num_blocks) + ", but got " +
           text(offsets[0]) + " and " + text(offsets[rows]);
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (offsets[row] > offsets[row + 1] || offsets[row + 1] > num_blocks) {
      return "crow_indices to ascend, but got " + text(offsets[row]) + " before " + text(offsets[row + 1]);
    }
    const Index* const begin = cols + offsets[row];
    const int64_t count = offsets[row + 1] - offsets[row];
    bool ascend = true;
    for (int64_t i = 1; i < count; ++i) { // without a branch, so that it becomes vector code
      ascend &= begin[i - 1] < begin[i];
    }
    if (count > 0 && (begin[0] < 0 || begin[count - 1] >= block_cols || !ascend)) {
      for (int64_t i = 0; i < count; ++i) {
        if (begin[i] < 0 || begin[i] >= block_cols) {
          return "col_indices to be from 0 to " + text(block_cols - 1) + ", but got " + text(begin[i]);
        }
        if (i > 0 && begin[i] <= begin[i - 1]) {
          return "col_indices to ascend in each row of blocks, but got " + text(begin[i - 1]) + " before " +
                 text(begin[i]) + " in row " + text(row);
        }
      }
    }
  }
  return "";
}

} // namespace

void check_block_indices(
    const char* op, const at::Tensor& crow_indices, const at::Tensor& col_indices, int64_t block_cols
) {
  AT_DISPATCH_INDEX_TYPES(crow_indices.scalar_type(), "blockdiag::sparse_linear", [&] {
    const auto fault = find_fault(
        crow_indices.const_data_ptr<index_t>(), crow_indices.numel() - 1, col_indices.const_data_ptr<index_t>(),
        col_indices.numel(), block_cols
    );
    TORCH_CHECK(fault.empty(), op, ": expected ", fault);
  });
}

} // namespace blockdiag
