// The gradients of weight and bias, where no kernel computes both at once.
#include "../bias_grad.h"
#include "../blockdiag.h"
#include "../check.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/irange.h>
#include <torch/library.h>

namespace blockdiag {

at::Tensor bias_grad(const at::Tensor& grad_output, bool stacked, bool bias_stacked, c10::SymIntArrayRef weight_sizes) {
  c10::SmallVector<int64_t, 5> leading;
  for (const auto dim : c10::irange(grad_output.dim() - (stacked ? 2 : 1))) {
    leading.push_back(dim);
  }
  // A copy where there is nothing to sum: a parameter's gradient must not share memory with the gradient that arrived. A sum
  // is laid out as what it is of, which may be transposed.
  const auto sum =
      leading.empty() ? grad_output.clone(at::MemoryFormat::Contiguous) : grad_output.sum(leading).contiguous();
  if (stacked == bias_stacked) {
    return sum;
  }
  return bias_stacked ? sum.view_symint({weight_sizes[0], weight_sizes[1]})
                      : sum.view_symint({weight_sizes[0] * weight_sizes[1]});
}

std::tuple<at::Tensor, at::Tensor> separate_weight_and_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  auto weight_grad = linear_weight_grad(grad_output, input, weight_sizes);
  const bool stacked = is_stacked(input.sym_sizes(), weight_sizes);
  return {std::move(weight_grad), bias_grad(grad_output, stacked, /*bias_stacked=*/true, weight_sizes)};
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("blockdiag::linear_weight_bias_grad", "")
                             .typed<decltype(linear_weight_bias_grad)>();
  return op.call(grad_output, input, weight_sizes);
}

} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, CompositeExplicitAutograd, m) {
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::separate_weight_and_bias_grad));
}
