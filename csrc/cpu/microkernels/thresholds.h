// Where one way to compute begins to pay more than another, and the sizes of tiles and panels.
//
// Measured on an AMD EPYC of the Zen 5 generation, by `python -m benchmarks` in its suites, with AVX-512 and limited to AVX2:
// where no instruction set is named, both prefer the same number.
#pragma once

#include "cpu/simd/vector.h"

namespace blockdiag::cpu {
namespace {

/// Rows of a strip, of two vectors of sums each: of 32 registers (AVX-512) or 16 (AVX2) some hold operands.
constexpr int kStripRows = Vector::kLanes == 16 ? 14 : 6;

/// A panel of the right operand, in packed elements: it stays in the L1 cache.
constexpr int kPanelCols = 2 * Vector::kLanes;
constexpr int64_t kPanelDepth = 256;

/// Rows and columns of a tile, the work of one task.
constexpr int64_t kTile = 256;
/// Columns of a tile that is read and written row by row.
constexpr int64_t kLongRow = 4096;

/// Up to so many rows, every element of the right operand is used so seldom that it is not worth packing.
constexpr int64_t kFewRows = 2;
/// The same for up to so many terms of a sum, in results of so many columns.
constexpr int64_t kShallow = 4, kWide = 512;

/// Multiplications for which another thread is worth waking. With few rows the right operand comes from memory for each.
constexpr int64_t kThreadProducts = 1 << 18, kThreadProductsFewRows = 1 << 17;

/// Up to so many rows, a right operand that is not transposed is read where it lies; or up to this leading dimension.
constexpr int64_t kInPlaceRows = 4 * kStripRows, kInPlaceLd = kTile;

/// Elements ahead at which short rows are prefetched.
constexpr int64_t kPrefetchDistance = 64;

} // namespace
} // namespace blockdiag::cpu
