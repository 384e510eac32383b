// An op lowered to a product of matrices in tensors, and its computation on a backend.
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
  // BLAS's operands: the caller's tensors, or copies of those that BLAS cannot address.
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

/// `tensor` if BLAS can address its `blocks` (nothing if they have no constant strides), or else a contiguous copy.
Placed place(const at::Tensor& tensor, const std::optional<Blocks>& blocks, const Blocks& contiguous);

/// Whether the device's preferred library computes with float32 matrices beside those of a half type. Where it does not,
/// autocast had better cast. The dispatch key of a backend with such libraries registers the answer.
using Converts = bool (*)(DType half);
bool converts(at::DeviceType device, DType half);
bool register_converts(at::DeviceType device, Converts function);

/// Whether a provider takes the product as it is. Some take no problem with float32 matrices beside half ones.
bool takes(const Providers& backend, const Product& product);

/// Allocates the result and computes it. A provider has to take it.
at::Tensor compute(const Product& product, const Providers& backend);

/// The same for a product whose epilogue is the bias's gradient, (batch, n). Nothing if no provider can.
std::optional<std::pair<at::Tensor, at::Tensor>> compute_with_bias_grad(
    const Product& product, const Providers& backend
);

} // namespace blockdiag
