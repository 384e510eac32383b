// The torch API that small_blocks.cu uses, on the emulated device. Included by emulated_cuda.h.
#pragma once

#include "emulated_cuda.h"

namespace at::cuda {

struct DeviceProperties {
  int major, multiProcessorCount;
};

inline const DeviceProperties* getCurrentDeviceProperties() {
  static DeviceProperties properties;
  properties = {emulated::machine().major, emulated::machine().processors};
  return &properties;
}

} // namespace at::cuda

namespace c10 {

/// A workspace filled with NaN, which is an operand until it is freed.
class DataPtr {
 public:
  DataPtr() = default;
  explicit DataPtr(size_t bytes) : bytes_(bytes, -1) {
    emulated::machine().regions.push_back({bytes_.data(), bytes, true, {}});
  }
  DataPtr& operator=(DataPtr&& other) noexcept {
    bytes_.swap(other.bytes_);
    return *this;
  }
  DataPtr(const DataPtr&) = delete;
  ~DataPtr() {
    std::erase_if(emulated::machine().regions, [&](const auto& region) { return region.begin == bytes_.data(); });
  }
  void* get() { return bytes_.data(); }

 private:
  std::vector<char> bytes_;
};

namespace cuda::CUDACachingAllocator {

struct Allocator {
  DataPtr allocate(size_t bytes) { return DataPtr(bytes); }
};

inline Allocator* get() {
  static Allocator allocator;
  return &allocator;
}

} // namespace cuda::CUDACachingAllocator
} // namespace c10
