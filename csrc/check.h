// The one check of shapes, dtypes and devices. Every backend calls it, so that callers of torch.ops get it too.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/SmallVector.h>

#include <optional>

namespace blockdiag {

using SymSizes = c10::SmallVector<c10::SymInt, 5>;

/// What the sizes of input and weight say of one layer.
struct LinearSizes {
  c10::SymInt batch; // product of the input's leading dimensions
  c10::SymInt num_blocks, in_block, out_block;
  bool stacked;    // activations are (*, num_blocks, block) rather than (*, num_blocks * block)
  SymSizes output; // the shape of the output
};

/// True if an input of these sizes is to be read as stacked, (*, G, K): its last dimension is K, and not G * K as that of a
/// concatenated input.
bool is_stacked(c10::SymIntArrayRef input_sizes, c10::SymIntArrayRef weight_sizes);

/// Checks the arguments of blockdiag::linear.
LinearSizes check_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

/// Checks the arguments of blockdiag::linear_input_grad.
LinearSizes check_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes
);

/// Checks the arguments of blockdiag::linear_weight_grad.
LinearSizes check_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
);

} // namespace blockdiag
