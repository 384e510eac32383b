// An op lowered to a product of matrices that lie in tensors, and how a backend computes it.
#pragma once

#include "problem/providers.h"

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <optional>
#include <utility>

namespace blockdiag {

/// A problem on tensors; its sizes may be 0.
struct Product {
  GemmProblem problem;
  // BLAS's operands, where the caller's tensors lie; copies only of what BLAS cannot address.
  at::Tensor a, b;
  // Contiguous, batch x m; undefined if there is none.
  at::Tensor bias;
  c10::DimVector result_sizes; // the result is always contiguous
};

/// A tensor that BLAS can address, and its matrices.
struct Placed {
  at::Tensor tensor;
  Blocks blocks;
};

/// `tensor` if BLAS can address its `blocks` (nothing if these have no strides), or else a contiguous copy.
Placed place(const at::Tensor& tensor, const std::optional<Blocks>& blocks, const Blocks& contiguous);

/// Allocates the result and computes it.
at::Tensor compute(const Product& product, const Providers& backend);

/// The same of a weight's gradient, with the gradient of the bias, (batch, n), from the same kernel. Nothing where no
/// provider has such a kernel.
std::optional<std::pair<at::Tensor, at::Tensor>> compute_with_bias_grad(Product product, const Providers& backend);

} // namespace blockdiag
