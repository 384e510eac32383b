// Gradients of any order.
//
// For every block, y = x W^T, dx = dy W and dW = dy^T x are one bilinear form read three ways, so the derivatives of
// each of the three ops are the other two (of conjugated arguments, as PyTorch defines complex gradients). A gradient
// has the dtype of what it is the gradient of: where a call has an out_dtype, all that it leads to have one, too.
#include "ops/linear.h"
#include "function_call.h"

#include <ATen/ops/_unsafe_view.h>
#include <torch/library.h>

#include <vector>

namespace blockdiag {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The sizes of the input that gave an output of these sizes. They are not saved: compiled autograd would treat each as
/// a constant, and recompile for every batch size.
c10::SymDimVector input_sizes_of(c10::SymIntArrayRef output_sizes, c10::SymIntArrayRef weight_sizes, bool stacked) {
  c10::SymDimVector sizes(output_sizes.begin(), output_sizes.end() - (stacked ? 2 : 1));
  if (stacked) {
    sizes.append({weight_sizes[0], weight_sizes[2]});
  } else {
    sizes.push_back(weight_sizes[0] * weight_sizes[2]);
  }
  return sizes;
}

using OptionalDtype = std::optional<at::ScalarType>;

/// The dtypes of the tensors given to a call with an out_dtype; nothing for other calls.
struct Dtypes {
  OptionalDtype left, right, bias;
};

// A list: compiled autograd would turn single numbers into symbols.
void save_dtypes(
    AutogradContext* ctx, OptionalDtype out_dtype, const at::Tensor& left, const at::Tensor& right,
    const std::optional<at::Tensor>& bias = {}
) {
  if (out_dtype) {
    std::vector<int64_t> dtypes;
    for (const auto* tensor : {&left, &right, bias ? &*bias : &right}) {
      dtypes.push_back(static_cast<int64_t>(tensor->scalar_type()));
    }
    ctx->saved_data["dtypes"] = std::move(dtypes);
  }
}

Dtypes saved_dtypes(const AutogradContext* ctx) {
  const auto found = ctx->saved_data.find("dtypes");
  if (found == ctx->saved_data.end()) {
    return {};
  }
  const auto dtypes = found->second.toIntVector();
  const auto at = [&](size_t index) { return static_cast<at::ScalarType>(dtypes[index]); };
  return {at(0), at(1), at(2)};
}

// Each function saves only the tensors that the requested gradients need, and none for its shape alone.
struct Linear : torch::autograd::Function<Linear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
      OptionalDtype out_dtype, FunctionCall* call
  ) {
    ctx->save_for_backward({
        input.requires_grad() ? call->right : at::Tensor(),
        weight.requires_grad() ? call->left : at::Tensor(),
    });
    ctx->saved_data["stacked"] = is_stacked(input.sym_sizes(), weight.sym_sizes());
    ctx->saved_data["weight_sizes"] = weight.sym_sizes();
    if (bias) {
      ctx->saved_data["bias_stacked"] = bias->dim() == 2;
    }
    save_dtypes(ctx, out_dtype, input, weight, bias);
    return call->run([&] { return blockdiag::linear(input, weight, bias, out_dtype); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const bool stacked = ctx->saved_data["stacked"].toBool();
    const auto weight_sizes = ctx->saved_data["weight_sizes"].toSymIntVector();
    const auto& grad_output = grad_outputs[0];
    const auto dtypes = saved_dtypes(ctx);
    variable_list grads(5);
    if (ctx->needs_input_grad(0)) {
      const auto input_sizes = input_sizes_of(grad_output.sym_sizes(), weight_sizes, stacked);
      grads[0] = linear_input_grad(grad_output, conj_if_complex(saved[0]), input_sizes, dtypes.left);
    }
    const auto bias_stacked = ctx->saved_data.find("bias_stacked");
    const bool needs_bias_grad = bias_stacked != ctx->saved_data.end() && ctx->needs_input_grad(2);
    if (needs_bias_grad && ctx->needs_input_grad(1) && dtypes.right == dtypes.bias) {
      std::tie(grads[1], grads[2]) =
          linear_weight_bias_grad(grad_output, conj_if_complex(saved[1]), weight_sizes, dtypes.right);
      if (!bias_stacked->second.toBool()) {
        grads[2] = at::_unsafe_view_symint(grads[2], {weight_sizes[0] * weight_sizes[1]});
      }
      return grads;
    }
    if (ctx->needs_input_grad(1)) {
      grads[1] = linear_weight_grad(grad_output, conj_if_complex(saved[1]), weight_sizes, dtypes.right);
    }
    if (needs_bias_grad) {
      grads[2] = bias_grad(grad_output, stacked, bias_stacked->second.toBool(), weight_sizes, dtypes.bias);
    }
    return grads;
  }
};

/// linear, which autocast leaves alone as it has an out_dtype.
at::Tensor linear_as_is(const at::Tensor& input, const at::Tensor& weight, OptionalDtype out_dtype) {
  return blockdiag::linear(input, weight, /*bias=*/std::nullopt, out_dtype ? out_dtype : input.scalar_type());
}

struct LinearInputGrad : torch::autograd::Function<LinearInputGrad> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
      OptionalDtype out_dtype, FunctionCall* call
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? call->right : at::Tensor(),
        weight.requires_grad() ? call->left : at::Tensor(),
    });
    ctx->saved_data["weight_sizes"] = weight.sym_sizes();
    save_dtypes(ctx, out_dtype, grad_output, weight);
    return call->run([&] { return linear_input_grad(grad_output, weight, input_sizes, out_dtype); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    const auto dtypes = saved_dtypes(ctx);
    variable_list grads(5);
    if (ctx->needs_input_grad(0)) {
      grads[0] = linear_as_is(grad, conj_if_complex(saved[0]), dtypes.left);
    }
    if (ctx->needs_input_grad(1)) {
      const auto weight_sizes = ctx->saved_data["weight_sizes"].toSymIntVector();
      grads[1] = linear_weight_grad(conj_if_complex(saved[1]), grad, weight_sizes, dtypes.right);
    }
    return grads;
  }
};

struct LinearWeightGrad : torch::autograd::Function<LinearWeightGrad> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
      OptionalDtype out_dtype, FunctionCall* call
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? call->right : at::Tensor(),
        input.requires_grad() ? call->left : at::Tensor(),
    });
    ctx->saved_data["stacked"] = is_stacked(input.sym_sizes(), weight_sizes);
    save_dtypes(ctx, out_dtype, grad_output, input);
    return call->run([&] { return linear_weight_grad(grad_output, input, weight_sizes, out_dtype); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    const auto dtypes = saved_dtypes(ctx);
    variable_list grads(5);
    if (ctx->needs_input_grad(0)) {
      grads[0] = linear_as_is(conj_if_complex(saved[0]), grad, dtypes.left);
    }
    if (ctx->needs_input_grad(1)) {
      const bool stacked = ctx->saved_data["stacked"].toBool();
      const auto input_sizes = input_sizes_of(saved[1].sym_sizes(), grad.sym_sizes(), stacked);
      grads[1] = linear_input_grad(conj_if_complex(saved[1]), grad, input_sizes, dtypes.right);
    }
    return grads;
  }
};

at::Tensor autograd_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias, OptionalDtype out_dtype
) {
  at::Tensor output;
  if (requires_grad(input, weight) || (bias && requires_grad(*bias))) {
    output = FunctionCall(input, weight).apply<Linear>(primal(bias), out_dtype);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = blockdiag::linear(input, weight, bias, out_dtype);
  }
  const bool bias_has_tangent = bias && has_tangent(*bias);
  if (has_tangent(input, weight) || bias_has_tangent) {
    at::Tensor bias_tangent;
    if (bias_has_tangent) {
      const int64_t feature_dims = is_stacked(input.sym_sizes(), weight.sym_sizes()) ? 2 : 1;
      const auto features = output.sym_sizes().slice(output.dim() - feature_dims);
      bias_tangent = tangent(*bias).reshape_symint(features).expand_as(output).to(output.scalar_type());
    }
    const auto product = [&](const at::Tensor& x, const at::Tensor& w) { return linear_as_is(x, w, out_dtype); };
    set_tangent(output, product, input, weight, bias_tangent);
  }
  return output;
}

at::Tensor autograd_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes, OptionalDtype out_dtype
) {
  return bilinear<LinearInputGrad>(linear_input_grad, grad_output, weight, input_sizes, out_dtype);
}

at::Tensor autograd_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes, OptionalDtype out_dtype
) {
  return bilinear<LinearWeightGrad>(linear_weight_grad, grad_output, input, weight_sizes, out_dtype);
}

std::tuple<at::Tensor, at::Tensor> autograd_linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes, OptionalDtype out_dtype
) {
  if (requires_grad(grad_output, input) || has_tangent(grad_output, input)) {
    return separate_weight_and_bias_grad(grad_output, input, weight_sizes, out_dtype);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_weight_bias_grad(grad_output, input, weight_sizes, out_dtype);
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, Autograd, m) {
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::autograd_linear_weight_bias_grad));
  m.impl("linear", TORCH_FN(blockdiag::autograd_linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::autograd_linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::autograd_linear_weight_grad));
}
