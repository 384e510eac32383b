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
    "sparse_linear(Tensor input, Tensor values, Tensor crow_indices, Tensor col_indices, Tensor? bias=None, "
    "Tensor? diagonal=None) -> Tensor",
    "sparse_linear_input_grad(Tensor grad_output, Tensor values, Tensor crow_indices, Tensor col_indices, "
    "SymInt[] input_sizes) -> Tensor",
    "sparse_linear_values_grad(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices, "
    "SymInt[] values_sizes) -> Tensor",
    "sparse_gru(Tensor input_gates, Tensor hidden, Tensor values, Tensor crow_indices, Tensor col_indices, "
    "Tensor? bias=None, Tensor? diagonal=None) -> Tensor",
    "sparse_lstm(Tensor input_gates, Tensor hidden, Tensor cell, Tensor values, Tensor crow_indices, "
    "Tensor col_indices, Tensor? bias=None, Tensor? diagonal=None) -> (Tensor, Tensor)",
};

} // namespace blockdiag
