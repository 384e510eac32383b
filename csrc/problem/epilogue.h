// The epilogue of a product C = op(A) op(B).
#pragma once

namespace blockdiag {

struct Epilogue {
  /// Adds the product to C rather than overwriting it.
  bool accumulate = false;
  /// Adds `bias`, (batch, m) and contiguous, to each column of C.
  bool bias = false;
  /// Sums op(B) over k into `bias_grad`, (batch, n) and contiguous: the gradient of a bias, beside that of its weight.
  bool bias_grad = false;

  bool operator==(const Epilogue&) const = default;
};

} // namespace blockdiag
