// Crossover points between algorithms, and the sizes of tiles and panels.
//
// Tuned on 2-core AMD EPYCs: Zen 5 with AVX-512, and limited to AVX2; strips, prefetching and dot products on Zen 4, with
// operands from the cache and from memory. A value that names no instruction set serves both.
#pragma once

#include "cpu/simd/vector.h"

namespace blockdiag::cpu {
namespace {

/// Whether the instruction set has 32 registers of 16 lanes (AVX-512), or 16 of 8 (AVX2).
constexpr bool kWideVectors = Vector::kLanes == 16;

/// Rows of a strip, each with two vectors of sums. A transposed left operand allows as many as fit the registers. The
/// rows of another one are read at once, and evict each other from a first cache of 8 ways where they are a multiple of
/// 4 KiB apart. So few still hide the latency of a multiply-add.
constexpr int kStripRows = kWideVectors ? 8 : 6, kStripRowsTransposed = kWideVectors ? 14 : 6;

/// A panel of the right operand, in packed elements. Fits the L1 cache.
constexpr int kPanelCols = 2 * Vector::kLanes;
constexpr int64_t kPanelDepth = 256;

/// Rows and columns of a tile, the work of one task.
constexpr int64_t kTile = 256;
/// Tiles with so many sums together take turns along the depth: those of narrow blocks read the same pages, which long
/// activations have more of than the TLB.
constexpr int64_t kGroupSums = 1 << 16;
/// Columns of a tile that is read and written row by row.
constexpr int64_t kLongRow = 4096;

/// Up to this many rows, the right operand is reused too little to be worth packing.
constexpr int64_t kFewRows = 2;
/// Up to so many rows, if sums are long (in packed elements) or very long, and if all together have no more elements:
/// rows of half types are converted whole.
constexpr int64_t kSomeRows = kWideVectors ? 8 : 4, kManyRows = kWideVectors ? 32 : 8;
constexpr int64_t kLongDots = 128, kVeryLongDots = 512, kDotsElements = 1 << 17;

/// Whether dot products compute so many rows, where the right operand is transposed.
template <typename Packed>
bool computes_by_dots(int64_t rows, int64_t depth) {
  return rows <= kFewRows || (depth >= kLongDots * Packed::kDepth && rows * depth <= kDotsElements &&
                              rows <= (depth >= kVeryLongDots ? kManyRows : kSomeRows));
}

/// A right operand that is not transposed is read row by row for few rows, and up to this many terms of a sum, in results
/// of this many columns.
constexpr int64_t kShallow = 4, kWide = 512;

/// Multiplications that are worth waking a thread for. With few rows, each one reads its right operand from memory.
constexpr int64_t kThreadProducts = 1 << 18, kThreadProductsFewRows = 1 << 17;

/// A right operand that is not transposed is read in place for so few rows, or if its rows are so close together.
constexpr int64_t kInPlaceRows = 4 * kStripRowsTransposed, kInPlaceLd = kTile;

/// Rows of one block of an activation are this far apart, or farther, where powers of two share few sets of the cache;
/// and so far apart in pages of their own.
constexpr int64_t kFarLd = 256, kPageLd = 1024;
/// An activation of so many elements leaves the first cache from block to block, and the second.
constexpr int64_t kLarge = 1 << 17, kVeryLarge = 1 << 19;
/// Up to this many columns, and from this many elements of the activation on, rows are prefetched so many in advance, in
/// strips (the next one's) and while they are packed: each is a few lines, too few for the hardware to prefetch. That
/// costs little where they come from the cache.
constexpr int64_t kNarrow = 64, kPrefetched = 1 << 15, kAheadRows = kStripRows, kAheadDepth = 24;

inline bool is_large(int64_t rows, int64_t ld) { return ld >= kFarLd && rows * ld >= kLarge; }
inline bool is_spread(int64_t rows, int64_t ld) { return ld >= kPageLd && rows * ld >= kVeryLarge; }
inline bool wants_prefetch(int64_t rows, int64_t width, int64_t ld) {
  return ld >= kFarLd && width <= kNarrow && rows * ld >= kPrefetched;
}

constexpr int64_t kLineBytes = 64;

/// Rows of activations that are transposed together for a block-sparse product; up to so few, they are read in place.
constexpr int64_t kSparseRows = 16, kSparseFewRows = 6;
/// Output features whose sums are stored at once, and rows of a batch whose activations stay in the second cache.
constexpr int64_t kSparseSums = 64, kSparsePart = 128;
/// Elements that are worth waking a thread for, to convert or transpose them.
constexpr int64_t kSparseLine = 1 << 15;

/// So many bytes of their right operand are prefetched in advance by dot products, or one step of them.
constexpr int64_t kPrefetchBytes = 1 << 13;
/// Operands of more bytes leave the second cache.
constexpr int64_t kCacheBytes = 1 << 20;

} // namespace
} // namespace blockdiag::cpu
