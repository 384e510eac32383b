// The C++ interface of blockdiag, for programs that link libtorch and libblockdiag.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>

#include <map>
#include <optional>
#include <string>
#include <tuple>

namespace blockdiag {

/// A linear layer whose weight is block diagonal, without the zeros:
/// output[..., g, :] = input[..., g, :] weight[g]^T + bias[g].
///
/// input:  (*, G * K) concatenated, or (*, G, K) stacked; concatenated where both fit.
/// weight: (G, N, K), block g being the weight of a torch::nn::Linear(K, N).
/// bias:   (G * N) or (G, N), or none.
/// returns (*, G * N) for a concatenated input and (*, G, N) for a stacked one, contiguous.
///
/// All share one device and one dtype: float16 or bfloat16 (accumulated in float32), float32, float64, complex64 or
/// complex128. With an `out_dtype`, here and below, the result has it, and each tensor is float32 or of one half type,
/// as `out_dtype` is, or all have `out_dtype`. Under autocast, `out_dtype` is autocast's where each tensor is float32 or
/// has that dtype and the library converts; else tensors are cast as those of torch::nn::functional::linear. Throws
/// c10::Error on anything else, before any work. Differentiable to any order.
at::Tensor linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias = std::nullopt,
    std::optional<at::ScalarType> out_dtype = std::nullopt
);

/// grad_output[..., g, :] weight[g], of shape `input_sizes`: the gradient of linear's input (for complex tensors, given
/// the conjugate of its weight).
at::Tensor linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype = std::nullopt
);

/// The sum over the batch of grad_output[..., g, :]^T input[..., g, :], of shape `weight_sizes`: the gradient of
/// linear's weight (for complex tensors, given the conjugate of its input).
at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype = std::nullopt
);

/// linear_weight_grad, and grad_output summed over the batch, (G, N): the gradient of linear's bias.
std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype = std::nullopt
);

/// A linear layer of whose weight only some blocks are kept, stored as a torch.sparse_bsr tensor:
/// output[..., i] = (input weight^T)[..., i] + bias[i] + diagonal[i] input[..., i mod in_features].
///
/// input:        (*, in_features), a multiple of in_block.
/// values:       (blocks, out_block, in_block), any sizes: the kept blocks, row by row of blocks.
/// crow_indices: (rows of blocks + 1): where the blocks of each row begin, from 0 to their number.
/// col_indices:  (blocks): the column of each, ascending in each row. Both are int32, or both int64.
/// bias:         (out_features), or none.
/// diagonal:     (out_features), a multiple of in_features: those of the square matrices that the weight stacks, to
///               whose blocks they add; or none.
/// returns       (*, out_features), contiguous.
///
/// Other tensors share one of linear's dtypes, and all share one device. Under autocast they are cast as those of
/// torch::nn::functional::linear. Throws c10::Error on anything else, before any work. Differentiable to any order.
at::Tensor sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias = std::nullopt, const std::optional<at::Tensor>& diagonal = std::nullopt
);

/// grad_output weight, of shape `input_sizes`: the gradient of sparse_linear's input, but for its diagonal (for complex
/// tensors, given the conjugate of the values).
at::Tensor sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
);

/// The kept blocks of the sum over the batch of grad_output^T input, of shape `values_sizes`: the gradient of
/// sparse_linear's values (for complex tensors, given the conjugate of its input).
at::Tensor sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
);

/// The versions that this library was built with, and those that it found at load time.
std::map<std::string, std::string> build_info();

} // namespace blockdiag
