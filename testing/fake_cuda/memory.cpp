// Devices and their memory: host memory between guard pages.
#include "fake.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstring>
#include <map>

namespace fake {
namespace {

struct Allocation {
  size_t size, mapped;
  int device; // -1: pinned host memory
  void* base;
};

struct Memory {
  std::mutex mutex;
  std::map<uintptr_t, Allocation> live;
  size_t used[kDevices] = {};

  const Allocation* find(uintptr_t address, uintptr_t* start = nullptr) const {
    auto after = live.upper_bound(address);
    if (after == live.begin()) {
      return nullptr;
    }
    const auto& [begin, allocation] = *--after;
    if (start != nullptr) {
      *start = begin;
    }
    return address < begin + std::max<size_t>(allocation.size, 1) ? &allocation : nullptr;
  }
};

Memory& memory() {
  static auto* memory = new Memory;
  return *memory;
}

thread_local int device = 0;

constexpr size_t kPage = 4096;

void* allocate(size_t size, int device) {
  const size_t mapped = (size + kPage - 1) / kPage * kPage + 2 * kPage;
  void* base = mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return nullptr;
  }
  char* begin = static_cast<char*>(base) + kPage;
  mprotect(begin, mapped - 2 * kPage, PROT_READ | PROT_WRITE);
  const std::lock_guard lock(memory().mutex);
  memory().live[reinterpret_cast<uintptr_t>(begin)] = {size, mapped, device, base};
  if (device >= 0) {
    memory().used[device] += size;
  }
  return begin;
}

cudaError_t release(void* pointer) {
  if (pointer == nullptr) {
    return cudaSuccess;
  }
  const std::lock_guard lock(memory().mutex);
  const auto found = memory().live.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == memory().live.end()) {
    return cudaErrorInvalidValue;
  }
  const auto [size, mapped, device, base] = found->second;
  if (device >= 0) {
    memory().used[device] -= size;
  }
  memory().live.erase(found);
  munmap(base, mapped);
  return cudaSuccess;
}

} // namespace

int current_device() { return device; }

void check_range(const char* what, uintptr_t begin, uintptr_t end, int device) {
  const std::lock_guard lock(memory().mutex);
  uintptr_t start = 0;
  const Allocation* found = memory().find(begin, &start);
  char text[256];
  if (found == nullptr || end > start + found->size) {
    std::snprintf(text, sizeof(text), "%s: the %zu bytes at %#zx are not all allocated", what, end - begin, begin);
    fail(text);
  }
  if (found->device != device) {
    std::snprintf(text, sizeof(text), "%s: memory of device %d on device %d", what, found->device, device);
    fail(text);
  }
}

} // namespace fake

using namespace fake;

FAKE_EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGetDevice(int* id) {
  *id = device;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaSetDevice(int id) {
  if (id < 0 || id >= kDevices) {
    return cudaErrorInvalidDevice;
  }
  device = id;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int id) {
  std::memset(properties, 0, sizeof(*properties));
  std::strcpy(properties->name, "Fake H100");
  std::memset(properties->uuid.bytes, 1 + id, sizeof(properties->uuid.bytes));
  properties->totalGlobalMem = kMemory;
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = 1024;
  properties->maxThreadsDim[2] = 64;
  properties->maxGridSize[0] = 2147483647;
  properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->sharedMemPerMultiprocessor = 228 << 10;
  properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
  properties->l2CacheSize = 1 << 20; // small: tuning computes on copies of twice that
  properties->memoryBusWidth = 5120;
  properties->textureAlignment = 512;
  properties->unifiedAddressing = 1;
  properties->pciBusID = id;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 << 10;
      return cudaSuccess;
    default: // among them the minor capability
      *value = 0;
      return cudaSuccess;
  }
}

FAKE_EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

// Errors are only returned; there is no last error.
FAKE_EXPORT cudaError_t cudaGetLastError() { return cudaSuccess; }

FAKE_EXPORT cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

FAKE_EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned int) { return cudaSuccess; }

FAKE_EXPORT cudaError_t cudaMalloc(void** pointer, size_t size) {
  if (is_unsafe_in_capture()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  log("cudaMalloc");
  *pointer = nullptr;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const int64_t left = option("malloc_after");
  if (left > 1) {
    set_option("malloc_after", left - 1);
  }
  if (left == 1 || memory().used[device] + size > kMemory) {
    return cudaErrorMemoryAllocation;
  }
  *pointer = allocate(size, device);
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaFree(void* pointer) {
  if (is_unsafe_in_capture()) {
    return cudaErrorStreamCaptureUnsupported;
  }
  cudaDeviceSynchronize();
  return release(pointer);
}

FAKE_EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned int) {
  *pointer = allocate(size, -1);
  return *pointer == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }

FAKE_EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const std::lock_guard lock(memory().mutex);
  *total = kMemory;
  *free = kMemory - memory().used[device];
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(memory().mutex);
  const Allocation* found = memory().find(reinterpret_cast<uintptr_t>(pointer));
  *attributes = {};
  attributes->type = found == nullptr      ? cudaMemoryTypeUnregistered
                     : found->device == -1 ? cudaMemoryTypeHost
                                           : cudaMemoryTypeDevice;
  attributes->device = found == nullptr ? -2 : std::max(found->device, 0);
  attributes->devicePointer = attributes->hostPointer = found == nullptr ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}
