// blockdiag's own kernels, run on the CPU by tests/cpp/emulated_cuda.h: this library's run_small_blocks takes
// precedence over that of blockdiag._C.
//
// They run at once. Where work has to wait, in a capture or with the option `lazy`, blockdiag falls back to another
// library.
#include "streams.h"

// CUDA's headers, included for the runtime's types, define these for a host compiler too.
#undef __device__
#undef __host__
#undef __global__
#undef __forceinline__
#undef __launch_bounds__
#include "emulated_cuda.h"

#define run_small_blocks emulated_small_blocks
#include "cuda/kernels/small_blocks.cu"
#undef run_small_blocks

namespace blockdiag::cuda {

__attribute__((visibility("default"))) bool run_small_blocks(const GemmProblem& problem, const Operands& operands) {
  const auto& [gemm, dtype, epilogue, float32] = problem;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  {
    const std::lock_guard state_lock(fake::state().mutex);
    if (fake::option("lazy") != 0 || fake::option("dry") != 0 || !fake::state().captures.empty()) {
      return false;
    }
  }
  const auto add = [&](const void* begin, int64_t elements, bool is_float32, bool writable) {
    if (begin != nullptr) {
      const auto address = reinterpret_cast<uintptr_t>(begin);
      const int64_t bytes = elements * (is_float32 ? 4 : 2);
      fake::check_range("small blocks", address, address + bytes, fake::current_device());
      emulated::machine().regions.push_back(
          {static_cast<const char*>(begin), static_cast<size_t>(bytes), writable, {}}
      );
    }
  };
  const auto add_matrix = [&](const void* begin, int64_t rows, int64_t cols, const Operand& operand, bool is_float32,
                              bool writable) {
    if (operand.transpose) {
      std::swap(rows, cols);
    }
    add(begin, (gemm.batch - 1) * operand.stride + (cols - 1) * operand.ld + rows, is_float32, writable);
  };
  constexpr int64_t kMaxBatch = 4096; // more would take too long
  if (gemm.batch > kMaxBatch) {
    return false;
  }
  add_matrix(operands.a, gemm.m, gemm.k, gemm.a, float32.a, false);
  add_matrix(operands.b, gemm.k, gemm.n, gemm.b, float32.b, false);
  add_matrix(operands.c, gemm.m, gemm.n, gemm.c, float32.c, true);
  add(operands.bias, gemm.batch * gemm.m, float32.bias, false);
  add(operands.bias_grad, gemm.batch * gemm.n, float32.c, true);
  emulated_small_blocks(problem, operands);
  emulated::machine().regions.clear();
  fake::log("run_small_blocks bias_grad=" + std::to_string(epilogue.bias_grad));
  // On all streams of the device, as the call's stream is unknown here.
  constexpr double kMicroseconds = 5;
  const std::lock_guard state_lock(fake::state().mutex);
  const int device = fake::current_device();
  fake::state().defaults[device].clock += kMicroseconds;
  for (auto* stream : fake::state().created) {
    stream->clock += stream->device == device ? kMicroseconds : 0;
  }
  return true;
}

} // namespace blockdiag::cuda
