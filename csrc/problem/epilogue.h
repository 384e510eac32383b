// What is done beside the product C = op(A) op(B), in the same problem.
#pragma once

namespace blockdiag {

struct Epilogue {
  /// Adds to C what it holds, rather than overwriting it.
  bool accumulate = false;
  /// Adds `bias`, (batch, m) and contiguous, to each column of C.
  bool bias = false;
  /// Sums op(B) over k into `bias_grad`, (batch, n) and contiguous: the gradient of a bias, beside that of its weight.
  bool bias_grad = false;

  bool operator==(const Epilogue&) const = default;
};

} // namespace blockdiag
