// Which of the algorithms that cuBLASLt's heuristic recommends is the fastest on this device, by measurement.
#pragma once

#include "lru_cache.h"
#include "plan.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>

namespace blockdiag::cuda {

/// How many callers want measured choices to be used, and how many of them want nothing new to be measured. Process-wide, as
/// the backward pass runs in threads of its own.
struct Tuning {
  std::atomic<int> used{0}, unmeasured{0};
};
Tuning& tuning();

/// What a choice is kept as: the algorithm's bytes, which mean something to one version of cuBLASLt; zeros for a bias
/// gradient that is faster summed by a kernel of its own. Choices are only ever looked up among those that the heuristic
/// recommends now, so that a wrong one does no harm.
using Choice = std::array<uint64_t, sizeof(cublasLtMatmulAlgo_t) / sizeof(uint64_t)>;

/// The problem of a choice: by the device's name, which holds for all devices of that name and in other processes, and with 0
/// for its ordinal.
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

/// The plan of the problem with the fastest candidate first, and no candidate if it is fastest to leave the problem's epilogue
/// to another kernel. Null if that is not known and cannot be measured now.
std::shared_ptr<const Plan> tuned_plan(
    cublasLtHandle_t handle, const std::shared_ptr<const Plan>& plan, const LtProblem& problem, const Operands& operands
);

} // namespace blockdiag::cuda
