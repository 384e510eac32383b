// Shared by the parts of the fake CUDA device, which __init__.py describes.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

// Only these are visible: the fake must not interpose its C++ symbols on the libraries behind it.
#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

constexpr int kDevices = 2;
constexpr size_t kAlignment = 512; // of what cudaMalloc returns
constexpr size_t kMemory = size_t{80} << 30;

/// Reports a mistake that a real device would not return as a status, or a call that the fake does not support: throws
/// an exception, which torch passes on to Python.
[[noreturn]] void fail(const std::string& what);

/// Switches by name; options.cpp documents them. 0 unless set.
int64_t option(const char* name);
void set_option(const char* name, int64_t value);

/// The option `nothing`: library calls and kernels return at once, unchecked and unlogged.
extern std::atomic<bool> do_nothing;

void log(const std::string& entry);

// Memory -------------------------------------------------------------------------------------------------------------

/// Fails unless the bytes [begin, end) are in one live allocation of `device`.
void check_range(const char* what, uintptr_t begin, uintptr_t end, int device);

// Streams ------------------------------------------------------------------------------------------------------------

using Work = std::function<void()>;

struct Graph {
  std::vector<Work> nodes;
  double cost = 0;
};

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  std::shared_ptr<Graph> graph = std::make_shared<Graph>();
  bool invalid = false;
};

struct Stream {
  int device = 0;
  std::shared_ptr<Capture> capture; // that the stream takes part in, if any
  double clock = 0;                 // microseconds of work put on the stream
  std::deque<Work> queue;           // only with the option `lazy`
  int64_t queued = 0, done = 0;     // number of items so far
  bool busy = false;                // a thread is running an item
};

int current_device();
Stream& stream_of(cudaStream_t stream); // null: the current device's default stream

/// Puts work on a stream: it runs at once, or when the stream is waited for (option `lazy`), or becomes part of a
/// graph.
void enqueue(Stream& stream, double cost, Work work);

/// Whether a stream capture forbids an unsafe call; if so, invalidates the capture, as a device does.
bool is_unsafe_in_capture();

// Matrix products ----------------------------------------------------------------------------------------------------

struct Matrix {
  const void* data;
  cudaDataType type;
  int64_t rows, cols, ld; // as stored, column by column
  int64_t stride;         // from one matrix of the batch to the next, in elements
};

enum class Epilogue { kNone, kBias, kGradA, kGradB };

struct Product {
  const char* function;
  int64_t m, n, k, batch;
  cublasOperation_t op_a, op_b;
  Matrix a, b, c, d;
  const void *alpha, *beta; // of type `scale`
  cudaDataType scale;
  bool tf32 = false;
  Epilogue epilogue = Epilogue::kNone;
  void* bias = nullptr;
  cudaDataType bias_type = CUDA_R_32F;
  int64_t bias_stride = 0;
  int64_t wrong_splits = 0; // as NVIDIA 6580689: skips the rest of k that does not fill all parts
};

int64_t size_of(cudaDataType type);

/// BLAS's own rules about sizes and leading dimensions.
bool is_consistent(const Product& product);

/// Checks that every access is in live memory of the stream's device, and puts the product on the stream.
void run(const Product& product, Stream& stream, double cost);

/// A library handle: the same for cuBLAS and cuBLASLt, as ATen uses one for the other.
struct Handle {
  uint64_t magic;
  int device;
  cudaStream_t stream;
  cublasMath_t math;
  cublasPointerMode_t pointers;
};

Handle& handle_of(const void* handle);

} // namespace fake
