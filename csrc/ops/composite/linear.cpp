// Composite ops, for dispatch keys without a kernel of their own.
#include "ops/linear.h"

#include <torch/library.h>

TORCH_LIBRARY_IMPL(blockdiag, CompositeExplicitAutograd, m) {
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::separate_weight_and_bias_grad));
}
