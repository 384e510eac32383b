// Crossover points between algorithms, and the sizes of tiles and panels.
//
// Tuned on a 2-core AMD EPYC (Zen 5) with AVX-512; benchmarks/results has the times there, and of that CPU
// limited to AVX2. What concerns prefetching, and kSomeRows, were tuned on Zen 3, with AVX2. A value that names no
// instruction set serves both.
#pragma once

#include "cpu/simd/vector.h"

namespace blockdiag::cpu {
namespace {

/// Rows of a strip, each with two vectors of sums; some of the 32 registers (AVX-512) or 16 (AVX2) hold operands.
constexpr int kStripRows = Vector::kLanes == 16 ? 14 : 6;

/// A panel of the right operand, in packed elements. Fits the L1 cache.
constexpr int kPanelCols = 2 * Vector::kLanes;
constexpr int64_t kPanelDepth = 256;

/// Rows and columns of a tile, the work of one task.
constexpr int64_t kTile = 256;
/// Columns of a tile that is read and written row by row.
constexpr int64_t kLongRow = 4096;

/// Up to this many rows, the right operand is reused too little to be worth packing.
constexpr int64_t kFewRows = 2;
/// Up to this many, if sums are so long, and no longer: rows of half types are converted whole.
constexpr int64_t kSomeRows = 8, kLongDots = 128, kLongestDots = 1 << 14;
/// The same up to this many terms of a sum, in results of this many columns.
constexpr int64_t kShallow = 4, kWide = 512;

/// Multiplications that are worth waking a thread for. With few rows, each one reads its right operand from memory.
constexpr int64_t kThreadProducts = 1 << 18, kThreadProductsFewRows = 1 << 17;

/// Up to this many rows, or up to this leading dimension, a right operand that is not transposed is read in place.
constexpr int64_t kInPlaceRows = 4 * kStripRows, kInPlaceLd = kTile;

/// Rows of one block of an activation are this far apart, or farther, where powers of two share few sets of the cache.
constexpr int64_t kFarLd = 256;
/// From this many elements on, an activation leaves the first cache from block to block, and the second.
constexpr int64_t kLarge = 1 << 17, kVeryLarge = 1 << 19;
/// Up to this many columns, rows of a very large activation are prefetched so many in advance, in strips, and while they
/// are packed: each is a few lines in a page of its own, which the hardware does not prefetch.
constexpr int64_t kNarrow = 64, kAheadRows = 2 * kStripRows, kAheadDepth = 24;

inline bool is_large(int64_t rows, int64_t ld) { return ld >= kFarLd && rows * ld >= kLarge; }
inline bool wants_prefetch(int64_t rows, int64_t width, int64_t ld) {
  return ld >= kFarLd && width <= kNarrow && rows * ld >= kVeryLarge;
}

constexpr int64_t kLineBytes = 64;

/// Prefetch distances in elements, for short rows and for dot products.
constexpr int64_t kPrefetchDistance = 64, kPrefetchDistanceDots = 256;

} // namespace
} // namespace blockdiag::cpu
