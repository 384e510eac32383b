// A backend: an ordered list of providers. The first that takes a problem computes it.
#pragma once

#include "gemm.h"
#include "sparse.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace blockdiag {

/// One way to compute problems: kernels of our own, or a library.
struct Provider {
  std::string name;
  /// Whether the provider supports the problem, judging by its description.
  bool (*takes)(const GemmProblem& problem);
  /// Computes the problem. False, with nothing written, if only the attempt shows that it cannot.
  bool (*run)(const GemmProblem& problem, const Operands& operands);
  /// Computes a block-sparse problem. False, with nothing written, if it does not support it; null if it has none.
  bool (*run_sparse)(const SparseProblem& problem, const SparseOperands& operands) = nullptr;
};

class Providers {
 public:
  /// The preferred provider is the one that the environment variable `variable` names, or else `preferred`, or else the
  /// first in the list. `where` ends the message about an unknown name.
  Providers(
      std::vector<Provider> providers, const char* variable, const char* preferred = nullptr, const char* where = ""
  )
      : providers_(std::move(providers)), where_(where) {
    const char* const asked = std::getenv(variable);
    const char* const name = asked != nullptr && *asked != 0 ? asked : preferred; // empty is unset
    first_ = name == nullptr ? 0 : find(name, variable);
  }

  /// Sets the preferred provider, process-wide: those before it are skipped, those after it are fallbacks. Throws
  /// std::invalid_argument for an unknown name.
  void prefer(const std::string& name) { first_ = find(name, "the name of a library"); }

  const std::string& preferred() const { return providers_[first_].name; }

  /// All names, last fallback first.
  std::string names() const {
    std::string names;
    for (auto provider = providers_.rbegin(); provider != providers_.rend(); ++provider) {
      names += (names.empty() ? "" : ", ") + provider->name;
    }
    return names;
  }

  /// Whether a provider takes the problem.
  bool take(const GemmProblem& problem) const {
    return std::any_of(providers_.begin() + first_, providers_.end(), [&](const auto& provider) {
      return provider.takes(problem);
    });
  }

  /// Whether the provider that would compute `problem` takes `other` itself.
  bool same_takes(const GemmProblem& problem, const GemmProblem& other) const {
    const auto provider = std::find_if(providers_.begin() + first_, providers_.end(), [&](const auto& each) {
      return each.takes(problem);
    });
    return provider != providers_.end() && provider->takes(other);
  }

  /// Computes a block-sparse problem; false if no provider did.
  bool run_sparse(const SparseProblem& problem, const SparseOperands& operands) const {
    return std::any_of(providers_.begin() + first_, providers_.end(), [&](const auto& provider) {
      return provider.run_sparse != nullptr && provider.run_sparse(problem, operands);
    });
  }

  /// Computes the problem; false if no provider did.
  bool run(const GemmProblem& problem, const Operands& operands) const {
    return std::any_of(providers_.begin() + first_, providers_.end(), [&](const auto& provider) {
      return provider.takes(problem) && provider.run(problem, operands);
    });
  }

 private:
  std::ptrdiff_t find(const std::string& name, const std::string& what) const {
    const auto found =
        std::find_if(providers_.begin(), providers_.end(), [&](const auto& provider) { return provider.name == name; });
    if (found == providers_.end()) {
      throw std::invalid_argument(
          "blockdiag: expected " + what + " to be one of [" + names() + "]" + where_ + ", but got \"" + name + "\""
      );
    }
    return found - providers_.begin();
  }

  std::vector<Provider> providers_;
  std::string where_;
  std::atomic<std::ptrdiff_t> first_;
};

} // namespace blockdiag
