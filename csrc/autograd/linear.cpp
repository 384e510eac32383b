// Gradients of any order.
//
// For every block, y = x W^T, dx = dy W and dW = dy^T x are one bilinear form read three ways, so the derivatives of each
// of the three ops are the other two (of conjugated arguments, as PyTorch defines complex gradients).
#include "../blockdiag.h"
#include "../check.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/irange.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace blockdiag {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor conj_if_complex(const at::Tensor& tensor) {
  return tensor.is_complex() ? tensor.conj() : tensor;
}

/// The gradient of the bias: grad_output summed over the batch, as (num_blocks, out_block) or as one row.
at::Tensor bias_grad(const at::Tensor& grad_output, bool stacked, bool bias_stacked, c10::SymIntArrayRef weight_sizes) {
  c10::SmallVector<int64_t, 5> leading;
  for (const auto dim : c10::irange(grad_output.dim() - (stacked ? 2 : 1))) {
    leading.push_back(dim);
  }
  // A copy where there is nothing to sum: a parameter's gradient must not share memory with the gradient that arrived.
  const auto sum = leading.empty() ? grad_output.clone() : grad_output.sum(leading);
  if (stacked == bias_stacked) {
    return sum;
  }
  return bias_stacked ? sum.view_symint({weight_sizes[0], weight_sizes[1]}) : sum.flatten();
}

// Each function saves only the tensors that the gradients asked for need: what only their shape is needed of is not kept.
struct Linear : torch::autograd::Function<Linear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias
  ) {
    ctx->save_for_backward({
        input.requires_grad() ? weight : at::Tensor(),
        weight.requires_grad() ? input : at::Tensor(),
    });
    ctx->saved_data["input_sizes"] = input.sym_sizes();
    ctx->saved_data["weight_sizes"] = weight.sym_sizes();
    if (bias) {
      ctx->saved_data["bias_stacked"] = bias->dim() == 2;
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return blockdiag::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto input_sizes = ctx->saved_data["input_sizes"].toSymIntVector();
    const auto weight_sizes = ctx->saved_data["weight_sizes"].toSymIntVector();
    const auto& grad_output = grad_outputs[0];
    variable_list grads(3);
    if (ctx->needs_input_grad(0)) {
      grads[0] = linear_input_grad(grad_output, conj_if_complex(saved[0]), input_sizes);
    }
    if (ctx->needs_input_grad(1)) {
      grads[1] = linear_weight_grad(grad_output, conj_if_complex(saved[1]), weight_sizes);
    }
    const auto bias_stacked = ctx->saved_data.find("bias_stacked");
    if (bias_stacked != ctx->saved_data.end() && ctx->needs_input_grad(2)) {
      grads[2] =
          bias_grad(grad_output, is_stacked(input_sizes, weight_sizes), bias_stacked->second.toBool(), weight_sizes);
    }
    return grads;
  }
};

struct LinearInputGrad : torch::autograd::Function<LinearInputGrad> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? weight : at::Tensor(),
        weight.requires_grad() ? grad_output : at::Tensor(),
    });
    ctx->saved_data["weight_sizes"] = weight.sym_sizes();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return linear_input_grad(grad_output, weight, input_sizes);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    variable_list grads(3);
    if (ctx->needs_input_grad(0)) {
      grads[0] = blockdiag::linear(grad, conj_if_complex(saved[0]));
    }
    if (ctx->needs_input_grad(1)) {
      grads[1] = linear_weight_grad(conj_if_complex(saved[1]), grad, ctx->saved_data["weight_sizes"].toSymIntVector());
    }
    return grads;
  }
};

struct LinearWeightGrad : torch::autograd::Function<LinearWeightGrad> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? input : at::Tensor(),
        input.requires_grad() ? grad_output : at::Tensor(),
    });
    ctx->saved_data["input_sizes"] = input.sym_sizes();
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return linear_weight_grad(grad_output, input, weight_sizes);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    variable_list grads(3);
    if (ctx->needs_input_grad(0)) {
      grads[0] = blockdiag::linear(conj_if_complex(saved[0]), grad);
    }
    if (ctx->needs_input_grad(1)) {
      grads[1] = linear_input_grad(conj_if_complex(saved[1]), grad, ctx->saved_data["input_sizes"].toSymIntVector());
    }
    return grads;
  }
};

// Forward-mode tangents go through the Function too, which refuses them, rather than being dropped here.
template <typename... Tensors>
bool is_differentiated(const Tensors&... tensors) {
  return (at::GradMode::is_enabled() && (tensors.requires_grad() || ...)) ||
         (tensors._fw_grad(/*level=*/0).defined() || ...);
}

at::Tensor autograd_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  if (is_differentiated(input, weight) || (bias && is_differentiated(*bias))) {
    return Linear::apply(input, weight, bias);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return blockdiag::linear(input, weight, bias);
}

at::Tensor autograd_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes
) {
  if (is_differentiated(grad_output, weight)) {
    return LinearInputGrad::apply(grad_output, weight, input_sizes);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_input_grad(grad_output, weight, input_sizes);
}

at::Tensor autograd_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  if (is_differentiated(grad_output, input)) {
    return LinearWeightGrad::apply(grad_output, input, weight_sizes);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_weight_grad(grad_output, input, weight_sizes);
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, Autograd, m) {
  m.impl("linear", TORCH_FN(blockdiag::autograd_linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::autograd_linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::autograd_linear_weight_grad));
}
