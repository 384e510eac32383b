// The ops' schemas.
#pragma once

namespace blockdiag {

constexpr const char* kSchemas[] = {
    "linear(Tensor input, Tensor weight, Tensor? bias=None, *, ScalarType? out_dtype=None) -> Tensor",
    "linear_input_grad(Tensor grad_output, Tensor weight, SymInt[] input_sizes, *, ScalarType? out_dtype=None) "
    "-> Tensor",
    "linear_weight_grad(Tensor grad_output, Tensor input, SymInt[] weight_sizes, *, ScalarType? out_dtype=None) "
    "-> Tensor",
    "linear_weight_bias_grad(Tensor grad_output, Tensor input, SymInt[] weight_sizes, *, ScalarType? out_dtype=None) "
    "-> (Tensor, Tensor)",
};

} // namespace blockdiag
