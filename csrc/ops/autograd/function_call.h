// Shared by all derivatives: calls of torch::autograd::Function as kernels of the Autograd key, and tangents.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/ScopeExit.h>
#include <torch/csrc/autograd/custom_function.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>

namespace blockdiag {
namespace {

inline at::Tensor conj_if_complex(const at::Tensor& tensor) { return tensor.is_complex() ? tensor.conj() : tensor; }

// Forward-mode AD keeps one tangent per tensor, always at level 0.

inline at::Tensor tangent(const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0); }

template <typename... Tensors>
bool has_tangent(const Tensors&... tensors) {
  return (tangent(tensors).defined() || ...);
}

inline at::Tensor primal(const at::Tensor& tensor) {
  return has_tangent(tensor) ? tensor._fw_primal(/*level=*/0) : tensor;
}

inline std::optional<at::Tensor> primal(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(primal(*tensor)) : std::nullopt;
}

/// One call of a torch::autograd::Function as a kernel of the Autograd key.
///
/// Function refuses to run under functorch's transforms (torch.func.grad and its relatives), because most callers use
/// it above the dispatcher, unaware of their levels. Ours run as torch's own derivatives do: functorch calls them once
/// per level, with that level's tensors. So the transforms are hidden from Function and restored for what it calls. It
/// refuses tangents as well, and gets only the primals.
class FunctionCall {
 public:
  FunctionCall(const at::Tensor& left, const at::Tensor& right) : left(left), right(right) {}

  /// Calls Function::apply(left, right, rest..., this); Function may save `left` and `right`.
  template <typename Function, typename... Rest>
  at::Tensor apply(const Rest&... rest) {
    const auto primals = std::make_tuple(primal(left), primal(right));
    const auto show_again = c10::make_scope_exit([this] { exchange(); });
    exchange();
    return Function::apply(std::get<0>(primals), std::get<1>(primals), rest..., this);
  }

  /// Calls forward() below autograd with the transforms restored, and gradients enabled if they were: Function disables
  /// them, which would affect the transforms' outer levels too.
  template <typename Forward>
  at::Tensor run(const Forward& forward) {
    const auto hide_again = c10::make_scope_exit([this] { exchange(); });
    exchange();
    const at::AutoGradMode grad_mode(grad_mode_);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return forward();
  }

  // With their tangents, which the tangents of the gradients depend on.
  const at::Tensor& left;
  const at::Tensor& right;

 private:
  void exchange() { std::swap(at::functorch::functorchTLSAccessor(), functorch_); }

  std::unique_ptr<at::functorch::FuncTorchTLSBase> functorch_;
  bool grad_mode_ = at::GradMode::is_enabled();
};

template <typename... Tensors>
bool requires_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (tensors.requires_grad() || ...);
}

inline at::Tensor sum_of(const at::Tensor& a, const at::Tensor& b) {
  return !a.defined() ? b : !b.defined() ? a : a.add(b);
}

/// Sets the tangent of op(left, right), which is linear in both, plus `more`.
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
  // In the result's layout: otherwise torch makes a copy, which fails for symbolic sizes. If nothing was added to
  // `more`, it is a view of an argument's tangent and always copied: in-place ops on the result would change it.
  sum = has_tangent(left, right) ? sum.contiguous() : sum.clone(at::MemoryFormat::Contiguous);
  result._set_fw_grad(sum, /*level=*/0, /*is_inplace_op=*/false);
}

/// op(left, right, rest...), which is linear in each of the two, with its derivatives: those of Function, and tangents.
template <typename Function, typename Op, typename... Rest>
at::Tensor bilinear(const Op& op, const at::Tensor& left, const at::Tensor& right, const Rest&... rest) {
  at::Tensor result;
  if (requires_grad(left, right)) {
    result = FunctionCall(left, right).apply<Function>(rest...);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    result = op(left, right, rest...);
  }
  if (has_tangent(left, right)) {
    set_tangent(result, [&](const at::Tensor& a, const at::Tensor& b) { return op(a, b, rest...); }, left, right);
  }
  return result;
}

} // namespace
} // namespace blockdiag
