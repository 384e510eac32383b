// The ops' schemas.
#pragma once

namespace blockdiag {

constexpr const char* kSchemas[] = {
    "linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
    "linear_input_grad(Tensor grad_output, Tensor weight, SymInt[] input_sizes) -> Tensor",
    "linear_weight_grad(Tensor grad_output, Tensor input, SymInt[] weight_sizes) -> Tensor",
    "linear_weight_bias_grad(Tensor grad_output, Tensor input, SymInt[] weight_sizes) -> (Tensor, Tensor)",
};

} // namespace blockdiag
