// The key of a cuBLASLt plan, and the cache of plans. No CUDA, no torch.
#include "cuda/cublaslt/lru_cache.h"
#include "cuda/cublaslt/lt_problem.h"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

using blockdiag::DType;
using blockdiag::cuda::alignment;
using blockdiag::cuda::KeyHash;
using blockdiag::cuda::LruCache;
using blockdiag::cuda::LtProblem;

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

void test_alignment() {
  require(alignment(0x1000, 64, 4) == 64, "the stride counts");
  require(alignment(0x1000, 64, 1) == 256, "the stride of a single block does not count, and 256 is enough");
  require(alignment(0x1002, 64, 4) == 2, "the address counts");
  require(alignment(0x1008, 6, 4) == 2, "so does a stride of few bytes");
  require(alignment(0x1000, 0, 4) == 256, "blocks that are all the same are aligned as the first");
}

LtProblem make_problem() {
  return {
      {
          .gemm = {.m = 1, .n = 2, .k = 3, .batch = 4, .a = {false, 5, 6}, .b = {true, 7, 8}, .c = {false, 9, 10}},
          .dtype = DType::kFloat16,
          .epilogue = {},
      },
      /*device=*/0,
      /*compute_type=*/12,
      /*reductions=*/18,
      /*alignments=*/{13, 14, 15, 16},
      /*workspace=*/17,
      /*deterministic=*/false,
  };
}

void test_every_part_of_a_problem_is_in_its_key() {
  const std::vector<std::function<void(LtProblem&)>> changes = {
      [](LtProblem& p) { ++p.gemm.m; },
      [](LtProblem& p) { ++p.gemm.n; },
      [](LtProblem& p) { ++p.gemm.k; },
      [](LtProblem& p) { ++p.gemm.batch; },
      [](LtProblem& p) { p.gemm.a.transpose = true; },
      [](LtProblem& p) { ++p.gemm.a.ld; },
      [](LtProblem& p) { ++p.gemm.a.stride; },
      [](LtProblem& p) { p.gemm.b.transpose = false; },
      [](LtProblem& p) { ++p.gemm.b.ld; },
      [](LtProblem& p) { ++p.gemm.b.stride; },
      [](LtProblem& p) { p.gemm.c.transpose = true; },
      [](LtProblem& p) { ++p.gemm.c.ld; },
      [](LtProblem& p) { ++p.gemm.c.stride; },
      [](LtProblem& p) { ++p.device; },
      [](LtProblem& p) { p.dtype = DType::kBFloat16; },
      [](LtProblem& p) { ++p.compute_type; },
      [](LtProblem& p) { p.epilogue.bias = true; },
      [](LtProblem& p) { ++p.reductions; },
      [](LtProblem& p) { ++p.alignments[0]; },
      [](LtProblem& p) { ++p.alignments[1]; },
      [](LtProblem& p) { ++p.alignments[2]; },
      [](LtProblem& p) { ++p.alignments[3]; },
      [](LtProblem& p) { ++p.workspace; },
      [](LtProblem& p) { p.deterministic = true; },
      [](LtProblem& p) { p.float32.c = true; },
  };
  std::set<LtProblem::Key> keys = {make_problem().key()};
  std::set<size_t> hashes = {KeyHash()(make_problem().key())};
  require(make_problem().key() == make_problem().key(), "equal problems have equal keys");
  require(changes.size() == LtProblem::kFields.size(), "each part has a name");
  for (size_t i = 0; i < changes.size(); ++i) {
    auto problem = make_problem();
    changes[i](problem);
    auto but_for_one = problem.key();
    but_for_one[i] = make_problem().key()[i];
    require(but_for_one == make_problem().key(), LtProblem::kFields[i]);
    keys.insert(problem.key());
    hashes.insert(KeyHash()(problem.key()));
  }
  auto with_bias = make_problem(), with_grad = make_problem();
  with_bias.epilogue.bias = with_grad.epilogue.bias_grad = true;
  require(with_bias.key() != with_grad.key(), "the epilogues differ");
  require(keys.size() == changes.size() + 1, "each part changes the key");
  require(hashes.size() == changes.size() + 1, "and the hash");
}

struct IntHash {
  size_t operator()(int key) const { return static_cast<size_t>(key); }
};

void test_the_longest_unused_goes_first() {
  LruCache<int, int, IntHash> cache(3);
  int made = 0;
  const auto get = [&](int key) { return *cache.get(key, [&] { return ++made, key * key; }); };
  for (int key : {1, 2, 3, 1}) {
    require(get(key) == key * key, "values belong to their keys");
  }
  require(made == 3, "a hit makes nothing");
  get(4); // 2 is the least recently used
  require(cache.size() == 3, "the capacity is kept");
  get(1), get(3), get(4);
  require(made == 4, "what was used last is kept");
  get(2);
  require(made == 5, "what was dropped is made again");
}

void test_a_value_is_replaced() {
  LruCache<int, int, IntHash> cache(2);
  cache.set(1, 10);
  const auto before = cache.find(1);
  cache.set(1, 11);
  require(*before == 10, "who holds the old value keeps it");
  require(*cache.find(1) == 11 && cache.size() == 1, "the new one takes its place");
  require(*cache.get(1, [] { return 12; }) == 11, "and is found");
  require(cache.find(2) == nullptr, "what was never set is not");
  cache.set(2, 20);
  cache.find(1);
  const auto entries = cache.entries();
  require(entries.size() == 2 && entries[0].first == 2 && entries[1].first == 1, "the longest unused comes first");
}

void test_a_failure_leaves_nothing() {
  LruCache<int, int, IntHash> cache(2);
  try {
    cache.get(1, []() -> int { throw std::runtime_error("no memory"); });
    require(false, "the failure reaches the caller");
  } catch (const std::runtime_error&) {
  }
  require(cache.size() == 0, "a failure leaves no entry");
  require(*cache.get(1, [] { return 7; }) == 7, "and the next call makes it");
}

void test_many_threads() {
  LruCache<int, int, IntHash> cache(16);
  std::vector<std::thread> threads;
  for (int start = 0; start < 4; ++start) {
    threads.emplace_back([&cache, start] {
      for (int i = 0; i < 20000; ++i) {
        const int key = (start * 7 + i * 13) % 40;
        require(*cache.get(key, [key] { return key + 1; }) == key + 1, "threads get their keys' values");
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  require(cache.size() <= 16, "the capacity is kept between threads");
}

} // namespace

int main() {
  test_alignment();
  test_every_part_of_a_problem_is_in_its_key();
  test_the_longest_unused_goes_first();
  test_a_value_is_replaced();
  test_a_failure_leaves_nothing();
  test_many_threads();
  std::puts("all passed");
}
