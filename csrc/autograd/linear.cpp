// Gradients of any order.
//
// For every block, y = x W^T, dx = dy W and dW = dy^T x are one bilinear form read three ways, so the derivatives of each
// of the three ops are the other two (of conjugated arguments, as PyTorch defines complex gradients).
#include "../bias_grad.h"
#include "../blockdiag.h"
#include "../check.h"

#ifdef BLOCKDIAG_CUDA
#include "../cuda/gemm.h"
#endif

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <tuple>
#include <utility>

namespace blockdiag {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor conj_if_complex(const at::Tensor& tensor) {
  return tensor.is_complex() ? tensor.conj() : tensor;
}

/// The sizes of the input that gave an output of these sizes. They are not saved: compiled autograd would take each as a
/// constant, and compile anew for every batch size.
c10::SymDimVector input_sizes_of(c10::SymIntArrayRef output_sizes, c10::SymIntArrayRef weight_sizes, bool stacked) {
  c10::SymDimVector sizes(output_sizes.begin(), output_sizes.end() - (stacked ? 2 : 1));
  if (stacked) {
    sizes.append({weight_sizes[0], weight_sizes[2]});
  } else {
    sizes.push_back(weight_sizes[0] * weight_sizes[2]);
  }
  return sizes;
}

/// Whether one kernel may compute the gradients of weight and bias: of tensors on a GPU, outside of torch.func's transforms,
/// torch.compile and tensor subclasses, which know the separate ops.
bool may_fuse_bias_grad([[maybe_unused]] const at::Tensor& grad_output, [[maybe_unused]] const at::Tensor& input) {
#ifdef BLOCKDIAG_CUDA
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet wrapped(
      {DispatchKey::Python,
       DispatchKey::Functionalize,
       DispatchKey::Batched,
       DispatchKey::FuncTorchBatched,
       DispatchKey::FuncTorchGradWrapper}
  );
  return grad_output.is_cuda() && cuda::may_fuse_bias_grad(grad_output.scalar_type()) &&
         !(grad_output.key_set() | input.key_set()).has_any(wrapped);
#else
  return false;
#endif
}

// Forward-mode AD carries one tangent in each tensor, at a level that is always 0.

at::Tensor tangent(const at::Tensor& tensor) {
  return tensor._fw_grad(/*level=*/0);
}

template <typename... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (tangent(tensors).defined() || ...);
}

at::Tensor primal(const at::Tensor& tensor) {
  return has_tangent(tensor) ? tensor._fw_primal(/*level=*/0) : tensor;
}

std::optional<at::Tensor> primal(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(primal(*tensor)) : std::nullopt;
}

/// One call of a torch::autograd::Function as a kernel of the Autograd key.
///
/// Function refuses to run under functorch's transforms (torch.func.grad and its relatives), because most callers use it above
/// the dispatcher, where it would be unaware of their levels. Ours run as torch's own derivatives do: functorch calls them
/// once for each level, with that level's tensors. So the transforms are hidden from Function, and shown again to what it
/// calls. It refuses tangents as well, which are not its business here: it gets the primals alone.
class FunctionCall {
 public:
  FunctionCall(const at::Tensor& left, const at::Tensor& right) : left(left), right(right) {}

  /// Calls Function::apply(left, right, rest..., this), in which Function may save `left` and `right`.
  template <typename Function, typename... Rest>
  at::Tensor apply(const Rest&... rest) {
    const auto primals = std::make_tuple(primal(left), primal(right));
    const auto show_again = c10::make_scope_exit([this] { exchange(); });
    exchange();
    return Function::apply(std::get<0>(primals), std::get<1>(primals), rest..., this);
  }

  /// Calls forward() below autograd with the transforms in sight, and gradients on if they were: Function has switched them
  /// off, which would hold for the transforms' outer levels too.
  template <typename Forward>
  at::Tensor run(const Forward& forward) {
    const auto hide_again = c10::make_scope_exit([this] { exchange(); });
    exchange();
    const at::AutoGradMode grad_mode(grad_mode_);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward();
  }

  // With their tangents: those of the gradients are made of them.
  const at::Tensor& left;
  const at::Tensor& right;

 private:
  void exchange() {
    std::swap(at::functorch::functorchTLSAccessor(), functorch_);
  }

  std::unique_ptr<at::functorch::FuncTorchTLSBase> functorch_;
  bool grad_mode_ = at::GradMode::is_enabled();
};

// Each function saves only the tensors that the gradients asked for need: what only their shape is needed of is not kept.
struct Linear : torch::autograd::Function<Linear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& input,
      const at::Tensor& weight,
      const std::optional<at::Tensor>& bias,
      FunctionCall* call
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
    return call->run([&] { return blockdiag::linear(input, weight, bias); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const bool stacked = ctx->saved_data["stacked"].toBool();
    const auto weight_sizes = ctx->saved_data["weight_sizes"].toSymIntVector();
    const auto& grad_output = grad_outputs[0];
    variable_list grads(4);
    if (ctx->needs_input_grad(0)) {
      const auto input_sizes = input_sizes_of(grad_output.sym_sizes(), weight_sizes, stacked);
      grads[0] = linear_input_grad(grad_output, conj_if_complex(saved[0]), input_sizes);
    }
    const auto bias_stacked = ctx->saved_data.find("bias_stacked");
    const bool needs_bias_grad = bias_stacked != ctx->saved_data.end() && ctx->needs_input_grad(2);
    if (needs_bias_grad && ctx->needs_input_grad(1) && may_fuse_bias_grad(grad_output, saved[1])) {
      auto [weight_grad, bias_grad] = linear_weight_bias_grad(grad_output, conj_if_complex(saved[1]), weight_sizes);
      grads[1] = weight_grad;
      grads[2] = bias_stacked->second.toBool() ? bias_grad : bias_grad.flatten();
      return grads;
    }
    if (ctx->needs_input_grad(1)) {
      grads[1] = linear_weight_grad(grad_output, conj_if_complex(saved[1]), weight_sizes);
    }
    if (needs_bias_grad) {
      grads[2] = bias_grad(grad_output, stacked, bias_stacked->second.toBool(), weight_sizes);
    }
    return grads;
  }
};

struct LinearInputGrad : torch::autograd::Function<LinearInputGrad> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx,
      const at::Tensor& grad_output,
      const at::Tensor& weight,
      c10::SymIntArrayRef input_sizes,
      FunctionCall* call
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? call->right : at::Tensor(),
        weight.requires_grad() ? call->left : at::Tensor(),
    });
    ctx->saved_data["weight_sizes"] = weight.sym_sizes();
    return call->run([&] { return linear_input_grad(grad_output, weight, input_sizes); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    variable_list grads(4);
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
      AutogradContext* ctx,
      const at::Tensor& grad_output,
      const at::Tensor& input,
      c10::SymIntArrayRef weight_sizes,
      FunctionCall* call
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? call->right : at::Tensor(),
        input.requires_grad() ? call->left : at::Tensor(),
    });
    ctx->saved_data["stacked"] = is_stacked(input.sym_sizes(), weight_sizes);
    return call->run([&] { return linear_weight_grad(grad_output, input, weight_sizes); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    variable_list grads(4);
    if (ctx->needs_input_grad(0)) {
      grads[0] = blockdiag::linear(conj_if_complex(saved[0]), grad);
    }
    if (ctx->needs_input_grad(1)) {
      const bool stacked = ctx->saved_data["stacked"].toBool();
      const auto input_sizes = input_sizes_of(saved[1].sym_sizes(), grad.sym_sizes(), stacked);
      grads[1] = linear_input_grad(conj_if_complex(saved[1]), grad, input_sizes);
    }
    return grads;
  }
};

template <typename... Tensors>
bool requires_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a.add(b);
}

/// Gives op(left, right), which is linear in both, its tangent, to which `more` is added.
template <typename Op>
void set_tangent(
    const at::Tensor& result, const Op& op, const at::Tensor& left, const at::Tensor& right, const at::Tensor& more = {}
) {
  auto sum = more;
  if (has_tangent(left)) {
    sum = sum_of(sum, op(tangent(left), primal(right)));
  }
  if (has_tangent(right)) {
    sum = sum_of(sum, op(primal(left), tangent(right)));
  }
  // Laid out as the result, or else torch makes a copy that is, which it cannot where sizes are symbolic. A copy in any case
  // where nothing was added to `more`, which is a view of an argument's tangent: in-place ops on the result would change it.
  sum = has_tangent(left, right) ? sum.contiguous() : sum.clone(at::MemoryFormat::Contiguous);
  result._set_fw_grad(sum, /*level=*/0, /*is_inplace_op=*/false);
}

at::Tensor autograd_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  at::Tensor output;
  if (requires_grad(input, weight) || (bias && requires_grad(*bias))) {
    output = FunctionCall(input, weight).apply<Linear>(primal(bias));
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = blockdiag::linear(input, weight, bias);
  }
  const bool bias_has_tangent = bias && has_tangent(*bias);
  if (has_tangent(input, weight) || bias_has_tangent) {
    at::Tensor bias_tangent;
    if (bias_has_tangent) {
      const int64_t feature_dims = is_stacked(input.sym_sizes(), weight.sym_sizes()) ? 2 : 1;
      const auto features = output.sym_sizes().slice(output.dim() - feature_dims);
      bias_tangent = tangent(*bias).reshape_symint(features).expand_as(output);
    }
    const auto product = [](const at::Tensor& x, const at::Tensor& w) { return blockdiag::linear(x, w); };
    set_tangent(output, product, input, weight, bias_tangent);
  }
  return output;
}

/// An op of two tensors that is linear in both, and of one's sizes.
template <typename Function, typename Op>
at::Tensor autograd_bilinear(const Op& op, const at::Tensor& left, const at::Tensor& right, c10::SymIntArrayRef sizes) {
  at::Tensor result;
  if (requires_grad(left, right)) {
    result = FunctionCall(left, right).apply<Function>(sizes);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = op(left, right, sizes);
  }
  if (has_tangent(left, right)) {
    set_tangent(result, [&](const at::Tensor& a, const at::Tensor& b) { return op(a, b, sizes); }, left, right);
  }
  return result;
}

at::Tensor autograd_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes
) {
  return autograd_bilinear<LinearInputGrad>(linear_input_grad, grad_output, weight, input_sizes);
}

at::Tensor autograd_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  return autograd_bilinear<LinearWeightGrad>(linear_weight_grad, grad_output, input, weight_sizes);
}

std::tuple<at::Tensor, at::Tensor> autograd_linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  if (requires_grad(grad_output, input) || has_tangent(grad_output, input)) {
    return separate_weight_and_bias_grad(grad_output, input, weight_sizes);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_weight_bias_grad(grad_output, input, weight_sizes);
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, Autograd, m) {
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::autograd_linear_weight_bias_grad));
  m.impl("linear", TORCH_FN(blockdiag::autograd_linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::autograd_linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::autograd_linear_weight_grad));
}
