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

/// Descriptors, by value, and the algorithms that compute the problem: the first is used, the others are there to be timed.
/// None if cuBLASLt has no kernel for the problem.
struct Plan {
  cublasLtMatmulDescOpaque_t operation;
  mutable cublasLtMatrixLayoutOpaque_t a, b, c; // only read, but through pointers that are not const
  std::vector<Candidate> candidates;
};

/// The plan of a problem, its candidates as cuBLASLt's heuristic orders them. Nothing if a stream is captured and the
/// heuristic cannot say, as some versions cannot then.
std::optional<Plan> make_plan(cublasLtHandle_t handle, const LtProblem& problem);

/// Queues the problem on the current stream. `workspace` holds as many bytes as the candidate asks for.
cublasStatus_t launch(
    cublasLtHandle_t handle, const Plan& plan, const Candidate& candidate, const Operands& operands, void* workspace
);

/// What cuBLASLt answers where it has no kernel; by its documentation the first alone.
inline bool is_unsupported(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
         status == CUBLAS_STATUS_ARCH_MISMATCH;
}

} // namespace blockdiag::cuda
