// An op lowered to a product of matrices in tensors, and its computation on a backend.
#pragma once

#include "problem/providers.h"

#include <ATen/core/Tensor.h>
#include <c10/util/DimVector.h>

#include <array>
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

/// The tensors of one product; some may be undefined.
using Tensors = std::array<at::Tensor, 3>;

/// What the dispatch key of a backend registers about float32 tensors beside those of a half type.
struct Mixing {
  /// Whether autocast should leave its casts to the op, which may not need them.
  bool (*converts)(DType half);
  /// Casts the tensors at once; one by one if null.
  void (*cast)(Tensors& tensors, at::ScalarType dtype) = nullptr;
};
bool register_mixing(at::DeviceType device, Mixing mixing);

/// Mixing's answer; false for a device that registered none.
bool converts(at::DeviceType device, DType half);

/// Casts those that are defined.
void cast(Tensors& tensors, at::ScalarType dtype);

/// Whether a provider takes the product as it is. Some take no problem with float32 matrices beside half ones.
bool takes(const Providers& backend, const Product& product);

/// Whether a provider takes the product once its operands are cast to its half type; the result may be float32.
bool takes_if_cast(const Providers& backend, const Product& product);

/// Allocates the result and computes it. A provider has to take it.
at::Tensor compute(const Product& product, const Providers& backend);

/// The same for a product whose epilogue is the bias's gradient, (batch, n). Nothing if no provider can.
std::optional<std::pair<at::Tensor, at::Tensor>> compute_with_bias_grad(
    const Product& product, const Providers& backend
);

} // namespace blockdiag
