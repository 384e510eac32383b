// The fake's switches and log, for tests: through ctypes, or at startup through FAKE_CUDA="name=value,...".
//
// lazy              1: work stays in its stream until something waits for it, which exposes missing dependencies
// dry               1: nothing is computed, and every kernel may be launched: for counting and timing host calls
// nothing           1: the same, without checks and log: for timing the host
// malloc_after      n: the next n - 1 calls of cudaMalloc work, and all later ones fail
// gemm_status       the status that cublasGemm* return, without computing
// matmul_status     the status that cublasLtMatmul returns, without computing
// heuristic_status  the status that cublasLtMatmulAlgoGetHeuristic returns
// heuristic_limit   n: it returns n - 1 algorithms at most
// heuristic_first   which of the invented algorithms comes first; see lt.cpp
// cost_ID           microseconds that algorithm ID takes, as events measure it
// wrong_ID          n: algorithm ID skips the rest of k that n equal parts do not cover
// unsteady_ID       1: it does so every other time
// skips_ID          1: algorithm ID does nothing
// mute_ID           n: algorithm ID lacks attribute n - 1 of cublasLtMatmulAlgoConfigAttributes_t
// fails_ID          1: algorithm ID returns CUBLAS_STATUS_INTERNAL_ERROR
#include "fake.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <shared_mutex>

namespace fake {
namespace {

struct Options {
  std::shared_mutex mutex;
  std::map<std::string, int64_t, std::less<>> values;

  Options() {
    const char* text = std::getenv("FAKE_CUDA");
    std::string rest = text == nullptr ? "" : text;
    while (!rest.empty()) {
      const auto end = std::min(rest.find(','), rest.size());
      const auto equals = rest.find('=');
      if (equals >= end) {
        fail("FAKE_CUDA is not name=value,...: " + rest);
      }
      values[rest.substr(0, equals)] = std::stoll(rest.substr(equals + 1, end - equals - 1));
      rest.erase(0, end + 1);
    }
    do_nothing = values["nothing"] != 0;
  }
};

struct Log {
  std::mutex mutex;
  std::vector<std::string> entries;
};

// Never destroyed: other libraries' destructors call us.
Options& options() {
  static auto* options = new Options;
  return *options;
}

Log& the_log() {
  static auto* log = new Log;
  return *log;
}

} // namespace

std::atomic<bool> do_nothing{false};

void fail(const std::string& what) { throw std::runtime_error("fake CUDA device: " + what); }

int64_t option(const char* name) {
  const std::shared_lock lock(options().mutex);
  const auto found = options().values.find(name);
  return found == options().values.end() ? 0 : found->second;
}

void set_option(const char* name, int64_t value) {
  const std::unique_lock lock(options().mutex);
  options().values[name] = value;
  do_nothing = options().values["nothing"] != 0;
}

void log(const std::string& entry) {
  if (!do_nothing) {
    const std::lock_guard lock(the_log().mutex);
    the_log().entries.push_back(entry);
  }
}

} // namespace fake

FAKE_EXPORT void fake_cuda_set(const char* name, int64_t value) { fake::set_option(name, value); }

FAKE_EXPORT int64_t fake_cuda_get(const char* name) { return fake::option(name); }

FAKE_EXPORT void fake_cuda_log(const char* entry) { fake::log(entry); }

FAKE_EXPORT void fake_cuda_log_clear() {
  const std::lock_guard lock(fake::the_log().mutex);
  fake::the_log().entries.clear();
}

/// Writes up to `size` bytes of entry `index` to `text`. Returns its length, or -1 if there is none.
FAKE_EXPORT int64_t fake_cuda_log_entry(int64_t index, char* text, int64_t size) {
  const std::lock_guard lock(fake::the_log().mutex);
  const auto& entries = fake::the_log().entries;
  if (index >= static_cast<int64_t>(entries.size())) {
    return -1;
  }
  const auto& entry = entries[index];
  std::memcpy(text, entry.data(), std::min<size_t>(size, entry.size()));
  return static_cast<int64_t>(entry.size());
}
