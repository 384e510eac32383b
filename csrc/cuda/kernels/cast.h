// Casts of float32 tensors to a half type, several in one launch: beside small products, launches are what casts cost.
#pragma once

#include "problem/dtype.h"

#include <cstdint>

namespace blockdiag::cuda {

/// `elements` contiguous numbers to cast; none if 0.
struct Cast {
  const float* from;
  void* to; // aligned to 16 bytes
  int64_t elements;
};

/// The tensors of one product: two operands and a bias.
struct Casts {
  Cast at[3];
};

/// Queues the casts on the current stream. Rounds to nearest even, as torch does.
void cast_to_half(const Casts& casts, DType half);

} // namespace blockdiag::cuda
