// The linear op and its gradients: one check, which every dispatch key calls, so that callers of torch.ops get it too,
// and the lowering to products.
#pragma once

#include "include/blockdiag.h"
#include "product.h"

#include <c10/core/SymInt.h>
#include <c10/util/SmallVector.h>

#include <tuple>

namespace blockdiag {

using SymSizes = c10::SmallVector<c10::SymInt, 5>;

/// The sizes of one layer, from its input and weight.
struct LinearSizes {
  c10::SymInt batch; // product of the input's leading dimensions
  c10::SymInt num_blocks, in_block, out_block;
  bool stacked;    // activations are (*, num_blocks, block) rather than (*, num_blocks * block)
  SymSizes output; // the shape of the output
};

/// True if an input of `dims` dimensions, the last of size `last`, is read as stacked, (*, G, K): if `last` is K, and
/// not G * K as in a concatenated input. Batching rules, sharding rules and translations use this rule too.
bool is_stacked(int64_t dims, const c10::SymInt& last, c10::SymIntArrayRef weight_sizes);

inline bool is_stacked(c10::SymIntArrayRef input_sizes, c10::SymIntArrayRef weight_sizes) {
  return is_stacked(static_cast<int64_t>(input_sizes.size()), input_sizes.back(), weight_sizes);
}

LinearSizes check_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
);

LinearSizes check_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
);

/// Serves blockdiag::linear_weight_grad and blockdiag::linear_weight_bias_grad.
LinearSizes check_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
);

/// The gradient of the bias alone: grad_output summed over the batch, as (num_blocks, out_block) or as one row.
at::Tensor bias_grad(
    const at::Tensor& grad_output, bool stacked, bool bias_stacked, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
);

/// linear_weight_grad through the dispatcher, and bias_grad as (num_blocks, out_block).
std::tuple<at::Tensor, at::Tensor> separate_weight_and_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
);

// The ops on a backend. Where no provider takes float32 tensors beside half ones, all are cast to out_dtype.

at::Tensor compute_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
);

at::Tensor compute_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
);

at::Tensor compute_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
);

/// Fused if a provider has such a kernel.
std::tuple<at::Tensor, at::Tensor> compute_linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
);

} // namespace blockdiag
