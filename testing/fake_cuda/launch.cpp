// Copies, kernels, and the driver functions that torch looks up.
#include "fake.h"

#include "cuda/kernels/cast.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <utility>

namespace fake {
namespace {

std::unordered_map<const void*, const char*>& kernels() {
  static auto* kernels = new std::unordered_map<const void*, const char*>;
  return *kernels;
}

std::string name_of(const void* function) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) {
    return "an unknown kernel";
  }
  char* demangled = abi::__cxa_demangle(found->second, nullptr, nullptr, nullptr);
  const std::string name = demangled == nullptr ? found->second : demangled;
  std::free(demangled);
  return name;
}

template <typename T>
Work cast_as(const blockdiag::cuda::Casts& casts) {
  return [casts] {
    for (const auto& [from, to, elements] : casts.at) {
      std::copy_n(from, elements, static_cast<T*>(to));
    }
  };
}

/// blockdiag's kernel that casts, whose memory is checked.
Work bind_cast(const std::string& name, const blockdiag::cuda::Casts& casts, int device) {
  for (const auto& [from, to, elements] : casts.at) {
    const auto begin = reinterpret_cast<uintptr_t>(from), result = reinterpret_cast<uintptr_t>(to);
    if (elements > 0) {
      check_range("cast: from", begin, begin + elements * sizeof(float), device);
      check_range("cast: to", result, result + elements * sizeof(c10::Half), device);
    }
  }
  return name.find("BFloat16") != std::string::npos ? cast_as<c10::BFloat16>(casts) : cast_as<c10::Half>(casts);
}

/// No other kernel can run here. A spin kernel passes, and with the options that compute nothing all do.
cudaError_t launch(const void* function, void** arguments, cudaStream_t stream) {
  if (do_nothing) {
    return cudaSuccess;
  }
  auto& found = stream_of(stream);
  const bool dry = option("dry") != 0;
  const std::string name = name_of(function);
  if (found.device != current_device()) {
    fail("the kernel " + name + " on a stream of another device");
  }
  log("kernel " + name);
  if (name.find("cast_kernel") != std::string::npos && !dry) {
    enqueue(found, 1, bind_cast(name, *static_cast<const blockdiag::cuda::Casts*>(arguments[0]), found.device));
    return cudaSuccess;
  }
  if (!dry && name.find("spin_kernel") == std::string::npos) {
    fail("the kernel " + name + " cannot run: aten.py has to compute its ATen op");
  }
  enqueue(found, 1, [] {});
  return cudaSuccess;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

thread_local std::vector<Configuration> configurations;

cudaError_t copy(void* to, const void* from, size_t size, cudaStream_t stream, bool wait) {
  log("cudaMemcpy");
  enqueue(stream_of(stream), 1, [=] { std::memcpy(to, from, size); });
  return wait ? cudaStreamSynchronize(stream) : cudaSuccess;
}

// Driver functions that are not faked: one of these for each, which knows its name.
constexpr size_t kUnfaked = 128;
std::array<std::string, kUnfaked> unfaked;

template <size_t index>
int call_unfaked() {
  fail(unfaked[index] + " is not faked");
}

template <size_t... indices>
constexpr std::array<int (*)(), kUnfaked> make_calls(std::index_sequence<indices...>) {
  return {call_unfaked<indices>...};
}

} // namespace
} // namespace fake

using namespace fake;

FAKE_EXPORT cudaError_t
cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  // A copy from pageable host memory ends before the call returns.
  return copy(to, from, size, stream, kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyHostToDevice);
}

FAKE_EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  return copy(to, from, size, nullptr, true);
}

FAKE_EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream, false);
}

FAKE_EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  log("cudaMemset");
  enqueue(stream_of(stream), 1, [=] { std::memset(to, value, size); });
  return cudaSuccess;
}

// Kernels

FAKE_EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}

FAKE_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

FAKE_EXPORT void __cudaUnregisterFatBinary(void**) {}

FAKE_EXPORT char __cudaInitModule(void**) { return 1; }

FAKE_EXPORT void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*
) {
  kernels()[function] = name;
}

FAKE_EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

FAKE_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

FAKE_EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const auto& last = configurations.back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  configurations.pop_back();
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t
__cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void** arguments, size_t, cudaStream_t stream) {
  return launch(kernel, arguments, stream);
}

FAKE_EXPORT cudaError_t
cudaLaunchKernel(const void* function, dim3, dim3, void** arguments, size_t, cudaStream_t stream) {
  return launch(function, arguments, stream);
}

FAKE_EXPORT cudaError_t
cudaLaunchKernelExC(const cudaLaunchConfig_t* configuration, const void* function, void** arguments) {
  return launch(function, arguments, configuration->stream);
}

FAKE_EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 90;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

FAKE_EXPORT cudaError_t
cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned int) {
  *blocks = 2;
  return cudaSuccess;
}

FAKE_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

// The driver: this library is also libcuda.so.1

FAKE_EXPORT int cuDevicePrimaryCtxGetState(int, unsigned int* flags, int* active) {
  *flags = 0;
  *active = 1;
  return 0;
}

FAKE_EXPORT int cuCtxGetCurrent(const void** context) {
  static const int some = 0;
  *context = &some;
  return 0;
}

FAKE_EXPORT int cuLogsRegisterCallback(void*, void*, void*) { return 0; }

FAKE_EXPORT int cuLogsUnregisterCallback(void*) { return 0; }

FAKE_EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** function, unsigned int, unsigned long long, cudaDriverEntryPointQueryResult* result
) {
  static const auto calls = make_calls(std::make_index_sequence<kUnfaked>());
  static std::mutex mutex;
  static size_t count = 0;
  const std::lock_guard lock(mutex);
  if (result != nullptr) {
    *result = cudaDriverEntryPointSuccess;
  }
  *function = dlsym(RTLD_DEFAULT, name);
  if (*function != nullptr) {
    return cudaSuccess;
  }
  unfaked.at(count) = name;
  *function = reinterpret_cast<void*>(calls.at(count++));
  return cudaSuccess;
}
