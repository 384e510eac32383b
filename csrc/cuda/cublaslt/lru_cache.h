// A cache that forgets what was not used for longest. Free of CUDA and of torch.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

namespace blockdiag::cuda {

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
