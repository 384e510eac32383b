// Measures which of the algorithms that cuBLASLt's heuristic recommends is the fastest on this device.
#pragma once

#include "lru_cache.h"
#include "plan.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>

namespace blockdiag::cuda {

/// How many callers want measured choices used, and how many of them want no new measurements. Process-wide, as the
/// backward pass runs in its own threads.
struct Tuning {
  std::atomic<int> used{0}, unmeasured{0};
};
Tuning& tuning();

/// A stored choice: the algorithm's bytes, valid for one version of cuBLASLt; zeros for a bias gradient that is faster
/// in a separate kernel. A choice only selects among the heuristic's current candidates, so a wrong one does no harm.
using Choice = std::array<uint64_t, sizeof(cublasLtMatmulAlgo_t) / sizeof(uint64_t)>;

/// The problem of a choice, with the device's name and 0 as its ordinal: valid for all devices of that name, and in
/// other processes.
struct ChoiceKey {
  std::string device;
  LtProblem::Key problem;

  bool operator==(const ChoiceKey&) const = default;
};
struct ChoiceKeyHash {
  size_t operator()(const ChoiceKey& key) const {
    return KeyHash()(key.problem) ^ std::hash<std::string>()(key.device);
  }
};
LruCache<ChoiceKey, Choice, ChoiceKeyHash>& choices();

/// The plan of the problem with the fastest candidate first, or without candidates if a separate kernel for the
/// epilogue is faster. Null if that is unknown and cannot be measured now.
std::shared_ptr<const Plan> tuned_plan(
    cublasLtHandle_t handle, const std::shared_ptr<const Plan>& plan, const LtProblem& problem, const Operands& operands
);

} // namespace blockdiag::cuda
