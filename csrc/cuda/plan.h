// What the choice of a cuBLASLt algorithm depends on, and where choices are kept. Free of CUDA and of torch: tested on a CPU.
#pragma once

#include "../gemm.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace blockdiag::cuda {

/// The largest power of two, up to 256, that divides the address of every block's first element.
inline int64_t alignment(uint64_t address, int64_t stride_bytes, int64_t batch) {
  const uint64_t bits = address | (batch > 1 ? static_cast<uint64_t>(stride_bytes) : 0) | 256;
  return int64_t{1} << std::countr_zero(bits);
}

/// What the GEMM's kernel does beside the product: nothing, add the bias, or sum B over k into the gradient of the bias.
enum class Epilogue : int64_t { kNone, kBias, kBiasGrad };

/// Everything that cuBLASLt's heuristic reads of a problem, and that a choice of its algorithms depends on; equal problems
/// have one plan.
struct Problem {
  Gemm gemm;
  int64_t device, dtype, compute_type;
  Epilogue epilogue;
  int64_t reductions;                // how parts of a sum may be added up: a mask of cublasLtReductionScheme_t
  std::array<int64_t, 4> alignments; // of A, B, C and the bias or its gradient
  int64_t workspace;                 // bytes allowed
  bool deterministic;                // what was measured without it was not checked for it

  /// The fields by name, in the order of a key. `device` is the ordinal.
  static constexpr std::array kFields = {
      "m",           "n",           "k",           "batch",          "transpose_a", "lda",
      "stride_a",    "transpose_b", "ldb",         "stride_b",       "transpose_c", "ldc",
      "stride_c",    "device",      "dtype",       "compute_type",   "epilogue",    "reductions",
      "alignment_a", "alignment_b", "alignment_c", "alignment_bias", "workspace",   "deterministic",
  };

  using Key = std::array<int64_t, kFields.size()>;

  Key key() const {
    const auto& [a, b, c] = std::tie(gemm.a, gemm.b, gemm.c);
    return {
        gemm.m,
        gemm.n,
        gemm.k,
        gemm.batch,
        a.transpose,
        a.ld,
        a.stride,
        b.transpose,
        b.ld,
        b.stride,
        c.transpose,
        c.ld,
        c.stride,
        device,
        dtype,
        compute_type,
        static_cast<int64_t>(epilogue),
        reductions,
        alignments[0],
        alignments[1],
        alignments[2],
        alignments[3],
        workspace,
        deterministic,
    };
  }
};

/// Each number multiplied in by the golden ratio's 64 bits, and the upper half, which that mixes best, folded onto the lower.
struct KeyHash {
  size_t operator()(const Problem::Key& key) const {
    uint64_t hash = 0;
    for (const int64_t number : key) {
      hash = (hash ^ static_cast<uint64_t>(number)) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 32;
    }
    return static_cast<size_t>(hash);
  }
};

/// At most `capacity` values by key, of which the longest unused go first. Safe to use from several threads.
template <typename Key, typename Value, typename Hash>
class LruCache {
 public:
  explicit LruCache(size_t capacity) : capacity_(capacity) {}

  /// The value of the key, or null.
  std::shared_ptr<const Value> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto known = index_.find(key);
    if (known == index_.end()) {
      return nullptr;
    }
    entries_.splice(entries_.begin(), entries_, known->second);
    return known->second->second;
  }

  /// The value of the key, made by `make` if there is none: outside of the lock, so that a slow or failing one holds up
  /// nobody, and leaves nothing. Of several threads that make one the first's is kept.
  template <typename Make>
  std::shared_ptr<const Value> get(const Key& key, const Make& make) {
    if (auto found = find(key)) {
      return found;
    }
    return insert(key, std::make_shared<const Value>(make()), /*replace=*/false);
  }

  /// Sets the value of the key, whether it has one or not.
  void set(const Key& key, Value value) {
    insert(key, std::make_shared<const Value>(std::move(value)), /*replace=*/true);
  }

  /// All keys and values, the longest unused first.
  std::vector<std::pair<Key, std::shared_ptr<const Value>>> entries() const {
    const std::lock_guard lock(mutex_);
    return {entries_.rbegin(), entries_.rend()};
  }

  size_t size() const {
    const std::lock_guard lock(mutex_);
    return entries_.size();
  }

 private:
  using Entry = std::pair<Key, std::shared_ptr<const Value>>;

  std::shared_ptr<const Value> insert(const Key& key, std::shared_ptr<const Value> value, bool replace) {
    const std::lock_guard lock(mutex_);
    if (const auto known = index_.find(key); known != index_.end()) {
      if (replace) {
        known->second->second = std::move(value);
      }
      return known->second->second;
    }
    std::list<Entry> entry; // nothing is half done if memory runs out
    entry.emplace_front(key, std::move(value));
    index_.emplace(key, entry.begin());
    entries_.splice(entries_.begin(), entry);
    if (entries_.size() > capacity_) {
      index_.erase(entries_.back().first);
      entries_.pop_back();
    }
    return entries_.front().second;
  }

  size_t capacity_;
  mutable std::mutex mutex_;
  std::list<Entry> entries_; // the last used first
  std::unordered_map<Key, typename std::list<Entry>::iterator, Hash> index_;
};

} // namespace blockdiag::cuda
