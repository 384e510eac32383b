// A least-recently-used cache. Independent of CUDA and torch.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace blockdiag::cuda {

/// At most `capacity` values by key; evicts the least recently used. Thread-safe.
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

  /// The value of the key, made by `make` if absent. `make` runs outside of the lock: a slow or failing call blocks no
  /// other thread and leaves nothing behind. If several threads make a value, the first is kept.
  template <typename Make>
  std::shared_ptr<const Value> get(const Key& key, const Make& make) {
    if (auto found = find(key)) {
      return found;
    }
    return insert(key, std::make_shared<const Value>(make()), /*replace=*/false);
  }

  /// Inserts or replaces the value of the key.
  void set(const Key& key, Value value) {
    insert(key, std::make_shared<const Value>(std::move(value)), /*replace=*/true);
  }

  /// All keys and values, least recently used first.
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
    std::list<Entry> entry; // keeps the cache consistent if memory runs out
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
  std::list<Entry> entries_; // most recently used first
  std::unordered_map<Key, typename std::list<Entry>::iterator, Hash> index_;
};

} // namespace blockdiag::cuda
