// The peak of fused multiply-adds of an instruction set: independent ones, on registers.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

// Assembly, so that no compiler removes, merges or spills anything. Each sum is a chain of its own: there must be enough
// to hide the latency of 4 to 6 cycles with two instructions in each. AVX2's 16 registers allow 14. Register 15 has the
// factors. `repeats` is at least 1. Code for any x86-64 uses none of the registers that it could not name here.
// clang-format off
#define BLOCKDIAG_REPEAT(name, width, sums, instruction, factors) \
  void name(int64_t repeats) { \
    asm volatile( \
        "vbroadcastss %[factor], %%" width "15\n" \
        ".irp sum, " sums "\n" \
        "vxorps %%" width "\\sum, %%" width "\\sum, %%" width "\\sum\n" \
        ".endr\n" \
        "1:\n" \
        ".irp sum, " sums "\n" \
        instruction " %%" width "15, %%" width "15, %%" width "\\sum\n" \
        ".endr\n" \
        "dec %[repeats]\n" \
        "jnz 1b\n" \
        "vzeroupper" \
        : [repeats] "+r"(repeats) \
        : [factor] "m"(factors) \
        : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
          "xmm12", "xmm13", "xmm14", "xmm15" \
    ); \
  }
// clang-format on
#define BLOCKDIAG_14 "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13"
#define BLOCKDIAG_24 BLOCKDIAG_14 ", 14, 16, 17, 18, 19, 20, 21, 22, 23, 24"

constexpr float factor = 0.3f;
constexpr uint32_t two_bfloat16_factors = 0x3e9a3e9a; // 0.3 each

BLOCKDIAG_REPEAT(avx2, "ymm", BLOCKDIAG_14, "vfmadd231ps", factor)
BLOCKDIAG_REPEAT(avx512, "zmm", BLOCKDIAG_24, "vfmadd231ps", factor)
BLOCKDIAG_REPEAT(avx512_bf16, "zmm", BLOCKDIAG_24, "vdpbf16ps", two_bfloat16_factors)

struct InstructionSet {
  const char* name;
  void (*function)(int64_t repeats);
  int64_t flops; // of one repeat
};

constexpr InstructionSet instruction_sets[] = {
    {"avx2", avx2, 14 * 8 * 2},
    {"avx512", avx512, 24 * 16 * 2},
    {"avx512_bf16", avx512_bf16, 24 * 32 * 2},
};

/// The seconds from when all threads are ready until the last is done.
template <typename Function>
double seconds_of(int num_threads, const Function& function) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> waiting{num_threads};
  std::atomic<bool> start{false};
  std::vector<std::thread> threads;
  for (int index = 1; index < num_threads; ++index) {
    threads.emplace_back([&] {
      --waiting;
      while (!start) {
        std::this_thread::yield();
      }
      function();
    });
  }
  while (waiting > 1) {
    std::this_thread::yield();
  }
  const auto began = Clock::now();
  start = true;
  function();
  for (auto& thread : threads) {
    thread.join();
  }
  return std::chrono::duration<double>(Clock::now() - began).count();
}

} // namespace

/// `num_threads` threads repeat the instruction set's multiply-adds. Returns the FLOPs of all, 0 for an unknown name.
extern "C" double multiply_adds(const char* name, int num_threads, int64_t repeats, double* seconds) {
  for (const auto& known : instruction_sets) {
    if (std::strcmp(name, known.name) == 0) {
      *seconds = seconds_of(num_threads, [&] { known.function(repeats); });
      return static_cast<double>(known.flops * repeats) * num_threads;
    }
  }
  return 0;
}
