// A problem in cuBLASLt's descriptors, with the algorithms that compute it.
#pragma once

#include "lt_problem.h"

#include <cublasLt.h>

#include <optional>
#include <vector>

namespace blockdiag::cuda {

struct Candidate {
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace; // bytes
};

/// Descriptors, by value, and the algorithms that compute the problem: the first is used, the others are for tuning.
/// There are none if cuBLASLt has no kernel for the problem.
struct Plan {
  cublasLtMatmulDescOpaque_t operation;
  mutable cublasLtMatrixLayoutOpaque_t a, b, c; // only read, but through non-const pointers
  std::vector<Candidate> candidates;
};

/// The plan of a problem, its candidates in the order of cuBLASLt's heuristic. Nothing during a stream capture in which
/// the heuristic cannot answer, as in some versions.
std::optional<Plan> make_plan(cublasLtHandle_t handle, const LtProblem& problem);

/// Queues the problem on the current stream. `workspace` has the size that the candidate needs.
cublasStatus_t launch(
    cublasLtHandle_t handle, const Plan& plan, const Candidate& candidate, const Operands& operands, void* workspace
);

/// The statuses by which cuBLASLt reports that it has no kernel; only the first is documented.
inline bool is_unsupported(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
         status == CUBLAS_STATUS_ARCH_MISMATCH;
}

} // namespace blockdiag::cuda
