// Recurrent layers over block-sparse states: sequences of other ops, which bring derivatives, batching rules and traces.
// In C++, as the ops of one step are so short that Python would take most of the time.
#include "include/blockdiag.h"

#include <ATen/ops/addcmul.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <vector>

namespace blockdiag {
namespace {

void check_gates(
    const char* op, int64_t gates, const at::Tensor& input_gates, const at::Tensor& hidden, const at::Tensor& values,
    const at::Tensor& crow_indices
) {
  TORCH_CHECK(
      input_gates.dim() >= 2 && hidden.dim() + 1 == input_gates.dim(), op,
      ": expected input_gates to have one dimension more than hidden, that of time, but got shapes ",
      input_gates.sym_sizes(), " and ", hidden.sym_sizes()
  );
  TORCH_CHECK(input_gates.sym_size(0) > 0, op, ": expected at least one step, but got none");
  auto of_step = c10::SymDimVector(hidden.sym_sizes().begin(), hidden.sym_sizes().end());
  of_step.back() *= gates;
  TORCH_CHECK(
      input_gates.sym_sizes().slice(1) == c10::SymIntArrayRef(of_step), op, ": expected a step of input_gates to have ",
      gates, " gates for each of hidden's features, so the shape ", c10::SymIntArrayRef(of_step), ", but got ",
      input_gates.sym_sizes().slice(1)
  );
  TORCH_CHECK(values.dim() == 3 && crow_indices.dim() == 1, op, ": expected a block-sparse weight");
  TORCH_CHECK(
      (crow_indices.sym_size(0) - 1) * values.sym_size(1) == of_step.back(), op,
      ": expected the weight to have as many output features as there are gates, ", of_step.back(), ", but got ",
      (crow_indices.sym_size(0) - 1) * values.sym_size(1)
  );
}

/// As torch::nn::GRU: r, z = sigmoid(...), n = tanh(x_n + r h_n), h' = (1 - z) n + z h (Cho et al., 2014).
at::Tensor sparse_gru(
    const at::Tensor& input_gates, const at::Tensor& hidden, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  check_gates("blockdiag::sparse_gru", 3, input_gates, hidden, values, crow_indices);
  const auto size = hidden.sym_size(-1);
  const auto part = [&](const at::Tensor& gates, int begin, int end) {
    return gates.slice_symint(-1, begin * size, end * size);
  };
  auto state = hidden;
  std::vector<at::Tensor> states;
  for (const auto& from_input : input_gates.unbind(0)) {
    const auto from_hidden = sparse_linear(state, values, crow_indices, col_indices, bias, diagonal);
    const auto both = part(from_input, 0, 2).add(part(from_hidden, 0, 2)).sigmoid_();
    const auto candidate = at::addcmul(part(from_input, 2, 3), part(both, 0, 1), part(from_hidden, 2, 3)).tanh_();
    state = at::lerp(candidate, state.to(candidate.scalar_type()), part(both, 1, 2));
    states.push_back(state);
  }
  return at::stack(states);
}

/// As torch::nn::LSTM (Hochreiter and Schmidhuber, 1997). Returns the hidden states, and the last cell state.
std::tuple<at::Tensor, at::Tensor> sparse_lstm(
    const at::Tensor& input_gates, const at::Tensor& hidden, const at::Tensor& cell, const at::Tensor& values,
    const at::Tensor& crow_indices, const at::Tensor& col_indices, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& diagonal
) {
  constexpr const char* op = "blockdiag::sparse_lstm";
  check_gates(op, 4, input_gates, hidden, values, crow_indices);
  TORCH_CHECK(
      cell.sym_sizes() == hidden.sym_sizes(), op, ": expected cell to have hidden's shape ", hidden.sym_sizes(),
      ", but got ", cell.sym_sizes()
  );
  auto state = hidden;
  auto memory = cell;
  std::vector<at::Tensor> states;
  for (const auto& from_input : input_gates.unbind(0)) {
    const auto gates = from_input.add(sparse_linear(state, values, crow_indices, col_indices, bias, diagonal));
    const auto parts = gates.chunk(4, -1); // input, forget, cell, output
    memory = at::addcmul(parts[1].sigmoid().mul(memory), parts[0].sigmoid(), parts[2].tanh());
    state = parts[3].sigmoid().mul(memory.tanh()).to(gates.scalar_type());
    states.push_back(state);
  }
  return {at::stack(states), std::move(memory)};
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, CompositeImplicitAutograd, m) {
  m.impl("sparse_gru", TORCH_FN(blockdiag::sparse_gru));
  m.impl("sparse_lstm", TORCH_FN(blockdiag::sparse_lstm));
}
