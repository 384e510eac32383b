// Runs csrc/cuda/kernels/small_blocks.cu on a CPU by emulating the CUDA that it uses: one thread block after another,
// each thread a fiber.
//
// Threads take turns in random order wherever they meet: at __syncthreads, and the 32 lanes of a warp at an mma, which
// follows the layout documented in the PTX ISA. Every access is checked: inside an operand, aligned to its size, no
// element written twice in a launch or read after a write, no shared memory read that was not written before the last
// __syncthreads or by the same thread. Traffic counts sectors and passes.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulated::machine().thread->index)
#define blockIdx (emulated::machine().block)
#define blockDim (emulated::machine().block_size)
#define gridDim (emulated::machine().grid)

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

struct Index {
  unsigned x = 0, y = 0;
};

/// Memory that a kernel may access.
struct Region {
  const char* begin;
  size_t bytes;
  bool writable;
  std::vector<bool> written; // by this launch
};

/// Traffic of global memory, in sectors of 32 bytes, and of shared memory, in passes over its banks.
struct Traffic {
  int64_t instructions = 0;    // by whole warps
  int64_t sectors = 0;         // touched, counted per instruction
  int64_t of_blocks = 0;       // touched, counted per thread block
  std::set<uintptr_t> touched; // sectors, in the whole launch
};

struct Shared {
  int64_t passes = 0, least = 0; // with bank conflicts, and without
};

/// One instruction of a warp: the addresses that its lanes access.
struct Access {
  size_t bytes = 0;
  bool shared = false, write = false;
  std::map<unsigned, uintptr_t> addresses; // by lane
};

struct Meeting {
  size_t members = 0;
  std::vector<struct Thread*> waiting;
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(size_t{1} << 16);
  Index index;
  bool finished = false;
  int64_t accesses = 0;
  float* d = nullptr;
  const uint32_t *a = nullptr, *b = nullptr;
};

struct Machine {
  // The state that kernels see.
  int major = 9, processors = 4;
  // The record of their accesses.
  int64_t launches = 0;
  Traffic reads, writes;
  Shared shared;
  bool count_traffic = false;

  std::mt19937_64 random{0};
  std::vector<Region> regions;
  Index block, block_size, grid;
  Thread* thread = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Thread*> ready;
  Meeting all;
  std::array<Meeting, 32> warps;
  alignas(16) std::array<char, 48 * 1024> shared_memory;
  size_t shared_bytes = 0;
  int64_t epoch = 0; // how often the block's threads have synchronized
  std::vector<std::pair<const Thread*, int64_t>>
      shared_writes;                                       // the writer of each byte of shared memory, and its epoch
  std::map<std::pair<unsigned, int64_t>, Access> accesses; // of the block, by warp, in order
};

inline Machine& machine() {
  static Machine only;
  return only;
}

inline void leave() { swapcontext(&machine().thread->context, &machine().scheduler); }

/// Waits for all members; the last one runs `action` for all.
template <typename Action>
void meet(Meeting& meeting, const Action& action) {
  auto& m = machine();
  meeting.waiting.push_back(m.thread);
  if (meeting.waiting.size() < meeting.members) {
    leave();
    return;
  }
  action(meeting.waiting);
  for (Thread* const other : meeting.waiting) {
    if (other != m.thread) {
      m.ready.push_back(other);
    }
  }
  meeting.waiting.clear();
  m.ready.push_back(m.thread); // so that the last one does not always go on first
  leave();
}

inline void start_thread() {
  machine().kernel();
  machine().thread->finished = true;
  leave();
}

/// Counts the block's accesses, instruction by instruction.
inline void count_accesses() {
  auto& m = machine();
  std::set<uintptr_t> of_block[2];
  for (const auto& [key, access] : m.accesses) {
    if (access.addresses.empty()) {
      continue;
    }
    if (access.shared) {
      // As many lanes per pass as move 128 bytes; each bank of 4 bytes serves one address per pass.
      const auto lanes = static_cast<unsigned>(std::min<size_t>(32, 128 / access.bytes));
      for (unsigned first = 0; first < 32; first += lanes) {
        std::array<std::set<uintptr_t>, 32> banks;
        for (const auto& [lane, address] : access.addresses) {
          for (size_t byte = 0; byte < access.bytes && lane / lanes == first / lanes; byte += 4) {
            banks[(address + byte) / 4 % 32].insert((address + byte) / 4);
          }
        }
        size_t passes = 0;
        for (const auto& words : banks) {
          passes = std::max(passes, words.size());
        }
        m.shared.passes += static_cast<int64_t>(passes);
        m.shared.least += passes > 0;
      }
      continue;
    }
    std::set<uintptr_t> sectors;
    for (const auto& [lane, address] : access.addresses) {
      sectors.insert(address / 32);
    }
    auto& traffic = access.write ? m.writes : m.reads;
    ++traffic.instructions;
    traffic.sectors += static_cast<int64_t>(sectors.size());
    traffic.touched.insert(sectors.begin(), sectors.end());
    of_block[access.write].insert(sectors.begin(), sectors.end());
  }
  m.reads.of_blocks += static_cast<int64_t>(of_block[0].size());
  m.writes.of_blocks += static_cast<int64_t>(of_block[1].size());
}

inline void run_block(Index block, unsigned threads) {
  auto& m = machine();
  m.block = block;
  m.block_size = {threads};
  m.all = {threads, {}};
  m.warps.fill({32, {}});
  m.accesses.clear();
  m.shared_memory.fill(-1); // NaN
  m.shared_writes.assign(m.shared_bytes, {});
  while (m.threads.size() < threads) {
    m.threads.push_back(std::make_unique<Thread>());
  }
  for (unsigned index = 0; index < threads; ++index) {
    auto& thread = *m.threads[index];
    thread.index = {index};
    thread.finished = false;
    thread.accesses = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, start_thread, 0);
    m.ready.push_back(&thread);
  }
  unsigned finished = 0;
  while (!m.ready.empty()) {
    std::swap(m.ready[m.random() % m.ready.size()], m.ready.back());
    m.thread = m.ready.back();
    m.ready.pop_back();
    swapcontext(&m.scheduler, &m.thread->context);
    finished += m.thread->finished;
  }
  if (finished != threads) {
    fail("threads wait for others that never come");
  }
  if (m.count_traffic) {
    count_accesses();
  }
}

/// Checks an access. Returns whether it is to shared memory.
inline void check_access(const char* at, size_t bytes, bool write) {
  auto& m = machine();
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) {
    fail("an access is aligned to its size");
  }
  const bool shared = at >= m.shared_memory.data() && at < m.shared_memory.data() + m.shared_memory.size();
  if (m.count_traffic) {
    auto& access = m.accesses[{m.thread->index.x / 32, m.thread->accesses}];
    access.bytes = bytes;
    access.shared = shared;
    access.write = write;
    access.addresses[m.thread->index.x % 32] = reinterpret_cast<uintptr_t>(at);
  }
  if (shared) {
    const size_t first = at - m.shared_memory.data();
    if (first + bytes > m.shared_bytes) {
      fail("shared memory is accessed as far as the launch asks for it");
    }
    for (size_t byte = first; byte < first + bytes; ++byte) {
      auto& [writer, when] = m.shared_writes[byte];
      if (writer != m.thread && (write ? writer != nullptr && when == m.epoch : writer == nullptr || when == m.epoch)) {
        fail("shared memory is read after a __syncthreads that follows its writing");
      }
      if (write) {
        writer = m.thread;
        when = m.epoch;
      }
    }
    return;
  }
  for (auto& region : m.regions) {
    if (at >= region.begin && at < region.begin + region.bytes) {
      const size_t first = at - region.begin;
      if (first + bytes > region.bytes) {
        fail("an access ends inside of its operand");
      }
      if (write && !region.writable) {
        fail("only results are written");
      }
      for (size_t byte = first; byte < first + bytes && region.writable; ++byte) {
        if (region.written[byte]) {
          fail("what a launch writes it writes once, and does not read");
        }
        region.written[byte] = write;
      }
      return;
    }
  }
  fail("an access is inside of an operand");
}

} // namespace emulated

inline void __syncthreads() {
  emulated::meet(emulated::machine().all, [](const auto&) { ++emulated::machine().epoch; });
}

/// "Byte Permute" of the CUDA math API, for selectors without sign replication.
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> (selector >> (4 * i) & 7) * 8 & 0xff) << (8 * i);
  }
  return result;
}

namespace blockdiag::cuda {

template <typename V>
V read(const void* from, bool valid) {
  V value{};
  if (valid) {
    emulated::check_access(static_cast<const char*>(from), sizeof(V), false);
    std::memcpy(&value, from, sizeof(V));
  }
  ++emulated::machine().thread->accesses;
  return value;
}

template <typename V>
void write(void* to, const V& value, bool valid) {
  if (valid) {
    emulated::check_access(static_cast<const char*>(to), sizeof(V), true);
    std::memcpy(to, &value, sizeof(V));
  }
  ++emulated::machine().thread->accesses;
}

template <typename V>
void write_shared(void* to, const V& value, bool valid) {
  write(to, value, valid);
}

inline float* shared_memory() { return reinterpret_cast<float*>(emulated::machine().shared_memory.data()); }

template <typename T>
uint32_t round_pair(float low, float high) {
  return T(low).x | uint32_t{T(high).x} << 16;
}

/// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type": lane 4 * group + member, element i.
template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  auto& machine = emulated::machine();
  auto& self = *machine.thread;
  self.d = d;
  self.a = a;
  self.b = b;
  emulated::meet(machine.warps[self.index.x / 32], [](const std::vector<emulated::Thread*>& lanes) {
    const auto element = [](const uint32_t* words, int i) {
      return static_cast<double>(
          static_cast<float>(T(static_cast<uint16_t>(words[i / 2] >> i % 2 * 16), T::from_bits()))
      );
    };
    double left[16][16], right[16][8];
    for (const auto* lane : lanes) {
      const int group = static_cast<int>(lane->index.x % 32) / 4, member = static_cast<int>(lane->index.x % 4);
      for (int i = 0; i < 8; ++i) {
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        left[row][member * 2 + i % 2 + (i < 4 ? 0 : 8)] = element(lane->a, i);
      }
      for (int i = 0; i < 4; ++i) {
        right[member * 2 + i % 2 + (i < 2 ? 0 : 8)][group] = element(lane->b, i);
      }
    }
    for (const auto* lane : lanes) {
      const int group = static_cast<int>(lane->index.x % 32) / 4, member = static_cast<int>(lane->index.x % 4);
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? group : group + 8, col = member * 2 + i % 2;
        double sum = lane->d[i];
        for (int k = 0; k < 16; ++k) {
          sum += left[row][k] * right[k][col];
        }
        lane->d[i] = static_cast<float>(sum);
      }
    }
  });
}

template <typename... Arguments>
void launch(
    void (*kernel)(Arguments...), int64_t x, int64_t y, int64_t threads, size_t shared_bytes, Arguments... arguments
) {
  auto& machine = emulated::machine();
  if (x < 1 || x > std::numeric_limits<int32_t>::max() || y < 1 || y > 65535 || threads < 32 || threads > 1024 ||
      threads % 32 != 0 || shared_bytes > machine.shared_memory.size()) {
    emulated::fail("a launch keeps to CUDA's limits");
  }
  for (auto& region : machine.regions) {
    region.written.assign(region.writable ? region.bytes : 0, false);
  }
  machine.shared_bytes = shared_bytes;
  machine.grid = {static_cast<unsigned>(x), static_cast<unsigned>(y)};
  machine.kernel = [&] { kernel(arguments...); };
  for (int64_t block = 0; block < x * y; ++block) {
    emulated::run_block(
        {static_cast<unsigned>(block % x), static_cast<unsigned>(block / x)}, static_cast<unsigned>(threads)
    );
  }
  ++machine.launches;
}

} // namespace blockdiag::cuda

#include "emulated_torch.h"
