// The gradient of the bias by itself, and with the gradient of the weight.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <tuple>

namespace blockdiag {

/// The gradient of the bias: grad_output summed over the batch, as (num_blocks, out_block) or as one row.
at::Tensor bias_grad(const at::Tensor& grad_output, bool stacked, bool bias_stacked, c10::SymIntArrayRef weight_sizes);

/// linear_weight_grad and bias_grad, the latter as (num_blocks, out_block), each by itself.
std::tuple<at::Tensor, at::Tensor> separate_weight_and_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
);

/// The op that may compute both at once: for tensors on a GPU.
std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
);

} // namespace blockdiag
