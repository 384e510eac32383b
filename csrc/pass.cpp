#include "pass.h"

#include "check.h"

#include <ATen/ops/empty.h>

#include <utility>

namespace blockdiag {
namespace {

/// LinearSizes of real tensors.
struct Sizes {
  int64_t batch, num_blocks, in_block, out_block;
  bool stacked;

  explicit Sizes(const LinearSizes& sizes)
      : batch(sizes.batch.expect_int()),
        num_blocks(sizes.num_blocks.expect_int()),
        in_block(sizes.in_block.expect_int()),
        out_block(sizes.out_block.expect_int()),
        stacked(sizes.stacked) {}
};

/// Row-major matrices of a contiguous activation: the blocks lie side by side in each row.
Blocks contiguous_activation(const Sizes& sizes, int64_t block) {
  return {sizes.batch, block, sizes.num_blocks * block, 1, block};
}

/// Row-major matrices of a contiguous weight.
Blocks contiguous_weight(const Sizes& sizes) {
  return {sizes.out_block, sizes.in_block, sizes.in_block, 1, sizes.out_block * sizes.in_block};
}

/// The stride that steps through all leading dimensions of `tensor` as one, or nothing if there is none.
std::optional<int64_t> batch_stride(const at::Tensor& tensor, int64_t leading_dims) {
  std::optional<int64_t> inner; // the innermost stride of more than one element
  int64_t next = 0;
  for (int64_t dim = leading_dims - 1; dim >= 0; --dim) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 1) {
      continue;
    }
    if (inner && stride != next) {
      return std::nullopt;
    }
    inner = inner.value_or(stride);
    next = stride * size;
  }
  return inner.value_or(0);
}

/// `tensor`, (*, num_blocks * block) or (*, num_blocks, block), as it lies in memory.
std::optional<Blocks> activation_blocks(const at::Tensor& tensor, const Sizes& sizes, int64_t block) {
  const int64_t leading_dims = tensor.dim() - (sizes.stacked ? 2 : 1);
  const auto row_stride = batch_stride(tensor, leading_dims);
  if (!row_stride) {
    return std::nullopt;
  }
  const int64_t col_stride = tensor.stride(-1);
  const int64_t block_stride = sizes.stacked ? tensor.stride(-2) : block * col_stride;
  return Blocks{sizes.batch, block, *row_stride, col_stride, block_stride};
}

Blocks weight_blocks(const at::Tensor& weight) {
  return {weight.size(1), weight.size(2), weight.stride(1), weight.stride(2), weight.stride(0)};
}

/// A tensor that BLAS can address, and its matrices.
struct Placed {
  at::Tensor tensor;
  Blocks blocks;
};

Placed place(const at::Tensor& tensor, const std::optional<Blocks>& blocks, const Blocks& contiguous) {
  if (tensor.is_contiguous()) {
    return {tensor, contiguous};
  }
  if (blocks && transposed_operand(*blocks)) {
    return {tensor, *blocks};
  }
  return {tensor.contiguous(), contiguous};
}

Placed place_activation(const at::Tensor& tensor, const Sizes& sizes, int64_t block) {
  return place(tensor, activation_blocks(tensor, sizes, block), contiguous_activation(sizes, block));
}

Placed place_weight(const at::Tensor& weight, const Sizes& sizes) {
  return place(weight, weight_blocks(weight), contiguous_weight(sizes));
}

c10::DimVector as_ints(c10::SymIntArrayRef sizes) {
  const auto ints = C10_AS_INTARRAYREF_SLOW(sizes);
  return {ints.begin(), ints.end()};
}

} // namespace

Pass linear_pass(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const auto checked = check_linear(input, weight, bias);
  const Sizes sizes(checked);
  auto x = place_activation(input, sizes, sizes.in_block);
  auto w = place_weight(weight, sizes);
  const auto y = contiguous_activation(sizes, sizes.out_block);
  return {
      describe_product(x.blocks, w.blocks.transposed(), y, sizes.num_blocks),
      std::move(w.tensor),
      std::move(x.tensor),
      bias ? bias->contiguous() : at::Tensor(),
      as_ints(checked.output),
  };
}

Pass linear_input_grad_pass(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes) {
  const Sizes sizes(check_linear_input_grad(grad_output, weight, input_sizes));
  auto dy = place_activation(grad_output, sizes, sizes.out_block);
  auto w = place_weight(weight, sizes);
  const auto dx = contiguous_activation(sizes, sizes.in_block);
  return {
      describe_product(dy.blocks, w.blocks, dx, sizes.num_blocks),
      std::move(w.tensor),
      std::move(dy.tensor),
      at::Tensor(),
      as_ints(input_sizes),
  };
}

Pass linear_weight_grad_pass(const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes) {
  const Sizes sizes(check_linear_weight_grad(grad_output, input, weight_sizes));
  auto dy = place_activation(grad_output, sizes, sizes.out_block);
  auto x = place_activation(input, sizes, sizes.in_block);
  return {
      describe_product(dy.blocks.transposed(), x.blocks, contiguous_weight(sizes), sizes.num_blocks),
      std::move(x.tensor),
      std::move(dy.tensor),
      at::Tensor(),
      as_ints(weight_sizes),
  };
}

at::Tensor run(const Pass& pass, RunGemm run_gemm) {
  auto result = at::empty(pass.result_sizes, pass.a.options());
  if (result.numel() == 0) {
    return result;
  }
  if (pass.gemm.k != 0) {
    run_gemm(pass, result);
  } else if (pass.bias.defined()) {
    result.view({-1, pass.bias.numel()}).copy_(pass.bias.view(-1));
  } else {
    result.zero_();
  }
  return result;
}

} // namespace blockdiag
