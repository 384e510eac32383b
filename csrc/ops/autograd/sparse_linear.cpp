// Gradients of any order: as those of the linear op, each derivative of one of the three ops is one of the other two.
#include "ops/sparse_linear.h"
#include "function_call.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/addcmul.h>
#include <torch/library.h>

#include <vector>

namespace blockdiag {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// sparse_linear in the dtypes of a backward pass: autocast would cast where a region encloses it.
at::Tensor sparse_linear_as_is(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices
) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return sparse_linear(input, values, crow_indices, col_indices);
}

c10::SymDimVector with_last(c10::SymIntArrayRef sizes, const c10::SymInt& last) {
  c10::SymDimVector result(sizes.begin(), sizes.end() - 1);
  result.push_back(last);
  return result;
}

at::Tensor sum_over_batch(const at::Tensor& grad_output) {
  std::vector<int64_t> leading;
  for (int64_t dim = 0; dim + 1 < grad_output.dim(); ++dim) {
    leading.push_back(dim);
  }
  // A copy if there is nothing to sum: a parameter's gradient must not alias the incoming gradient.
  return leading.empty() ? grad_output.clone(at::MemoryFormat::Contiguous) : grad_output.sum(leading).contiguous();
}

struct SparseLinear : torch::autograd::Function<SparseLinear> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
      const at::Tensor& col_indices, const std::optional<at::Tensor>& bias, FunctionCall* call
  ) {
    ctx->save_for_backward({
        input.requires_grad() ? call->right : at::Tensor(),
        values.requires_grad() ? call->left : at::Tensor(),
        crow_indices,
        col_indices,
    });
    ctx->saved_data["in_features"] = input.sym_size(-1);
    ctx->saved_data["values_sizes"] = values.sym_sizes();
    ctx->saved_data["has_bias"] = bias.has_value();
    return call->run([&] { return sparse_linear(input, values, crow_indices, col_indices, bias); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad_output = grad_outputs[0];
    variable_list grads(6);
    if (ctx->needs_input_grad(0)) {
      const auto sizes = with_last(grad_output.sym_sizes(), ctx->saved_data["in_features"].toSymInt());
      grads[0] = sparse_linear_input_grad(grad_output, conj_if_complex(saved[0]), saved[2], saved[3], sizes);
    }
    if (ctx->needs_input_grad(1)) {
      const auto sizes = ctx->saved_data["values_sizes"].toSymIntVector();
      grads[1] = sparse_linear_values_grad(grad_output, conj_if_complex(saved[1]), saved[2], saved[3], sizes);
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(4)) {
      grads[4] = sum_over_batch(grad_output);
    }
    return grads;
  }
};

struct SparseLinearInputGrad : torch::autograd::Function<SparseLinearInputGrad> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
      const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes, FunctionCall* call
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? call->right : at::Tensor(),
        values.requires_grad() ? call->left : at::Tensor(),
        crow_indices,
        col_indices,
    });
    ctx->saved_data["values_sizes"] = values.sym_sizes();
    return call->run([&] {
      return sparse_linear_input_grad(grad_output, values, crow_indices, col_indices, input_sizes);
    });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    variable_list grads(6);
    if (ctx->needs_input_grad(0)) {
      grads[0] = sparse_linear_as_is(grad, conj_if_complex(saved[0]), saved[2], saved[3]);
    }
    if (ctx->needs_input_grad(1)) {
      const auto sizes = ctx->saved_data["values_sizes"].toSymIntVector();
      grads[1] = sparse_linear_values_grad(conj_if_complex(saved[1]), grad, saved[2], saved[3], sizes);
    }
    return grads;
  }
};

struct SparseLinearValuesGrad : torch::autograd::Function<SparseLinearValuesGrad> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
      const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes, FunctionCall* call
  ) {
    ctx->save_for_backward({
        grad_output.requires_grad() ? call->right : at::Tensor(),
        input.requires_grad() ? call->left : at::Tensor(),
        crow_indices,
        col_indices,
    });
    ctx->saved_data["in_features"] = input.sym_size(-1);
    return call->run([&] {
      return sparse_linear_values_grad(grad_output, input, crow_indices, col_indices, values_sizes);
    });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad = grad_outputs[0];
    variable_list grads(6);
    if (ctx->needs_input_grad(0)) {
      grads[0] = sparse_linear_as_is(conj_if_complex(saved[0]), grad, saved[2], saved[3]);
    }
    if (ctx->needs_input_grad(1)) {
      const auto sizes = with_last(saved[1].sym_sizes(), ctx->saved_data["in_features"].toSymInt());
      grads[1] = sparse_linear_input_grad(conj_if_complex(saved[1]), grad, saved[2], saved[3], sizes);
    }
    return grads;
  }
};

at::Tensor autograd_sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  const bool differentiates = requires_grad(input, values) || (bias && requires_grad(*bias));
  const bool bias_has_tangent = bias && has_tangent(*bias);
  const bool has_tangents = has_tangent(input, values) || bias_has_tangent;
  if (diagonal && (differentiates || has_tangents || requires_grad(*diagonal) || has_tangent(*diagonal))) {
    check_sparse_linear(input, values, crow_indices, col_indices, bias, diagonal);
    const auto product = autograd_sparse_linear(input, values, crow_indices, col_indices, bias, std::nullopt);
    const auto in_features = input.sym_size(-1);
    if (product.sym_size(-1) == in_features) {
      return at::addcmul(product, input, *diagonal);
    }
    const auto each = std::vector<c10::SymInt>{-1, in_features};
    return at::addcmul(product.unflatten_symint(-1, each), input.unsqueeze(-2), diagonal->unflatten_symint(-1, each))
        .flatten(-2);
  }
  at::Tensor output;
  if (differentiates) {
    output = FunctionCall(input, values).apply<SparseLinear>(crow_indices, col_indices, primal(bias));
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = sparse_linear(input, values, crow_indices, col_indices, bias, diagonal);
  }
  if (has_tangents) {
    at::Tensor bias_tangent;
    if (bias_has_tangent) {
      bias_tangent = tangent(*bias).expand_as(output);
    }
    const auto product = [&](const at::Tensor& x, const at::Tensor& v) {
      return sparse_linear_as_is(x, v, crow_indices, col_indices);
    };
    set_tangent(output, product, input, values, bias_tangent);
  }
  return output;
}

at::Tensor autograd_sparse_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& values, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef input_sizes
) {
  return bilinear<SparseLinearInputGrad>(
      sparse_linear_input_grad, grad_output, values, crow_indices, col_indices, input_sizes
  );
}

at::Tensor autograd_sparse_linear_values_grad(
    const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& crow_indices,
    const at::Tensor& col_indices, c10::SymIntArrayRef values_sizes
) {
  return bilinear<SparseLinearValuesGrad>(
      sparse_linear_values_grad, grad_output, input, crow_indices, col_indices, values_sizes
  );
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, Autograd, m) {
  m.impl("sparse_linear", TORCH_FN(blockdiag::autograd_sparse_linear));
  m.impl("sparse_linear_input_grad", TORCH_FN(blockdiag::autograd_sparse_linear_input_grad));
  m.impl("sparse_linear_values_grad", TORCH_FN(blockdiag::autograd_sparse_linear_values_grad));
}
