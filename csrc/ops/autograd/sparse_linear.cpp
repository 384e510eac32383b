// Gradients of any order: as those of the linear op, each derivative of one of the three ops is one of the other two.
#include "ops/sparse_linear.h"
#include "function_call.h"

#include <ATen/core/dispatch/Dispatcher.h>
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

/// Features as those of the square matrices that a weight with a diagonal stacks: (*, matrices, in_features).
at::Tensor by_matrix(const at::Tensor& tensor, const c10::SymInt& in_features) {
  auto sizes = with_last(tensor.sym_sizes(), tensor.sym_size(-1) / in_features.max(1));
  sizes.push_back(in_features);
  return tensor.reshape_symint(sizes); // batched gradients have no rule for unflatten, and none for flatten
}

/// diagonal(f) input(f mod in_features): the diagonal's share in the output.
at::Tensor scaled(const at::Tensor& input, const at::Tensor& diagonal) {
  const auto in_features = input.sym_size(-1);
  const auto product = input.unsqueeze(-2).mul(by_matrix(diagonal, in_features));
  return product.reshape_symint(with_last(input.sym_sizes(), diagonal.sym_size(0)));
}

struct SparseLinear : torch::autograd::Function<SparseLinear> {
  static constexpr bool is_traceable = true;

  /// `own_diagonal`: with its tangent, if it has one.
  static at::Tensor forward(
      AutogradContext* ctx, const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices,
      const at::Tensor& col_indices, const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal,
      const std::optional<at::Tensor>* own_diagonal, FunctionCall* call
  ) {
    check_sparse_linear(input, values, crow_indices, col_indices, bias, diagonal); // before sizes are read
    const bool diagonal_requires_grad = diagonal && diagonal->requires_grad();
    ctx->save_for_backward({
        input.requires_grad() ? call->right : at::Tensor(),
        values.requires_grad() || diagonal_requires_grad ? call->left : at::Tensor(),
        crow_indices,
        col_indices,
        diagonal && input.requires_grad() ? **own_diagonal : at::Tensor(),
    });
    ctx->saved_data["in_features"] = input.sym_size(-1);
    ctx->saved_data["values_sizes"] = values.sym_sizes();
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["has_diagonal"] = diagonal.has_value();
    return call->run([&] { return sparse_linear(input, values, crow_indices, col_indices, bias, diagonal); });
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const auto& grad_output = grad_outputs[0];
    const auto in_features = ctx->saved_data["in_features"].toSymInt();
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const bool has_diagonal = ctx->saved_data["has_diagonal"].toBool();
    const size_t diagonal_index = has_bias ? 5 : 4; // among the tensors that there are
    variable_list grads(8);
    if (ctx->needs_input_grad(0)) {
      const auto sizes = with_last(grad_output.sym_sizes(), in_features);
      grads[0] = sparse_linear_input_grad(grad_output, conj_if_complex(saved[0]), saved[2], saved[3], sizes);
      if (has_diagonal) {
        const auto factors = by_matrix(conj_if_complex(saved[4]), in_features);
        grads[0] = grads[0].add(by_matrix(grad_output, in_features).mul(factors).sum(-2));
      }
    }
    if (ctx->needs_input_grad(1)) {
      const auto sizes = ctx->saved_data["values_sizes"].toSymIntVector();
      grads[1] = sparse_linear_values_grad(grad_output, conj_if_complex(saved[1]), saved[2], saved[3], sizes);
    }
    if (has_bias && ctx->needs_input_grad(4)) {
      grads[4] = sum_over_batch(grad_output);
    }
    if (has_diagonal && ctx->needs_input_grad(diagonal_index)) {
      const auto inputs = conj_if_complex(saved[1]).unsqueeze(-2);
      const auto product = by_matrix(grad_output, in_features).mul(inputs);
      grads[5] = sum_over_batch(product.reshape_symint(grad_output.sym_sizes()));
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
    check_sparse_linear_values_grad(grad_output, input, crow_indices, col_indices, values_sizes);
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
  const auto is_differentiated = [](const std::optional<at::Tensor>& tensor) {
    return tensor && requires_grad(*tensor);
  };
  const auto moves = [](const std::optional<at::Tensor>& tensor) { return tensor && has_tangent(*tensor); };
  at::Tensor output;
  if (requires_grad(input, values) || is_differentiated(bias) || is_differentiated(diagonal)) {
    output = FunctionCall(input, values)
                 .apply<SparseLinear>(crow_indices, col_indices, primal(bias), primal(diagonal), &diagonal);
  } else {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    output = sparse_linear(input, values, crow_indices, col_indices, bias, diagonal);
  }
  if (has_tangent(input, values) || moves(bias) || moves(diagonal)) {
    at::Tensor more;
    if (moves(bias)) {
      more = tangent(*bias).expand_as(output);
    }
    if (moves(diagonal)) {
      more = sum_of(more, scaled(primal(input), tangent(*diagonal)));
    }
    if (diagonal && has_tangent(input)) {
      more = sum_of(more, scaled(tangent(input), primal(*diagonal)));
    }
    const auto product = [&](const at::Tensor& x, const at::Tensor& v) {
      return sparse_linear_as_is(x, v, crow_indices, col_indices);
    };
    set_tangent(output, product, input, values, more);
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
