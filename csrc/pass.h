// One pass of the layer, from tensors to a GEMM that a backend runs.
#pragma once

#include "gemm.h"

#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/DimVector.h>

#include <optional>

namespace blockdiag {

/// Forward, gradient of the input, or gradient of the weight: `result = left right (+ bias)` in every block.
struct Pass {
  Gemm gemm;
  // BLAS's operands, where the caller's tensors lie; copies only of what BLAS cannot address.
  at::Tensor a, b;
  // Contiguous, num_blocks * out_block elements; undefined if there is none.
  at::Tensor bias;
  c10::DimVector result_sizes; // the result is always contiguous
};

Pass linear_pass(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

Pass linear_input_grad_pass(const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes);

Pass linear_weight_grad_pass(const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes);

/// Computes a pass into its result, bias included. Not called with a size of 0.
using RunGemm = void (*)(const Pass& pass, const at::Tensor& result);

/// Allocates the result of a pass, and computes it.
at::Tensor run(const Pass& pass, RunGemm run_gemm);

} // namespace blockdiag
