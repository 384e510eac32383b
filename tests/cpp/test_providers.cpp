// Selection among a backend's providers. No torch.
#include "problem/providers.h"

#include <cstdio>
#include <cstdlib>

namespace {

using blockdiag::DType;
using blockdiag::GemmProblem;
using blockdiag::Operands;
using blockdiag::Provider;
using blockdiag::Providers;

void require(bool condition, const char* what) {
  if (!condition) {
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
  }
}

std::string ran; // the providers that were asked to compute, in order

template <char name, bool succeeds>
bool run(const GemmProblem& /*problem*/, const Operands& /*operands*/) {
  ran += name;
  return succeeds;
}

bool takes_half(const GemmProblem& problem) { return is_half(problem.dtype); }

bool takes_all(const GemmProblem& problem) { return !problem.epilogue.bias_grad; }

std::vector<Provider> three() {
  return {
      {"kernels", takes_half, run<'k', true>},
      {"picky", takes_all, run<'p', false>},
      {"fallback", takes_all, run<'f', true>},
  };
}

/// The providers asked for a problem of this dtype, in order.
std::string asked(const Providers& providers, DType dtype) {
  ran.clear();
  require(providers.run({{}, dtype, {}}, {}), "a provider computes it");
  return ran;
}

void test_the_first_that_takes_a_problem_computes_it() {
  const Providers providers(three(), "UNSET_VARIABLE");
  require(providers.preferred() == "kernels", "the first is preferred by default");
  require(providers.names() == "fallback, picky, kernels", "names are listed from the last fallback on");
  require(asked(providers, DType::kFloat16) == "k", "who takes a problem computes it");
  require(asked(providers, DType::kFloat32) == "pf", "who cannot leaves it to the next");
  const GemmProblem with_grad{{}, DType::kFloat32, {.bias_grad = true}};
  ran.clear();
  require(!providers.take(with_grad) && !providers.run(with_grad, {}) && ran.empty(), "nobody takes it");
}

void test_those_before_the_preferred_one_are_left_out() {
  Providers providers(three(), "UNSET_VARIABLE", "fallback");
  require(asked(providers, DType::kFloat16) == "f", "the constructor's preference holds");
  providers.prefer("picky");
  require(providers.preferred() == "picky" && asked(providers, DType::kFloat16) == "pf", "and that of a call");
  try {
    providers.prefer("fast");
    require(false, "an unknown name is an error");
  } catch (const std::invalid_argument& error) {
    const std::string expected =
        "blockdiag: expected the name of a library to be one of [fallback, picky, kernels], but got \"fast\"";
    require(error.what() == expected, "which lists the names");
  }
  require(providers.preferred() == "picky", "and changes nothing");
}

void test_who_computes_a_problem_is_asked_about_another() {
  const Providers providers(three(), "UNSET_VARIABLE");
  const GemmProblem half{{}, DType::kFloat16, {}}, single{{}, DType::kFloat32, {}};
  const GemmProblem half_grad{{}, DType::kFloat16, {.bias_grad = true}},
      single_grad{{}, DType::kFloat32, half_grad.epilogue};
  require(providers.same_takes(half, half_grad) && !providers.same_takes(half, single), "the first, if it takes both");
  require(!providers.same_takes(single, single_grad), "the first that takes a problem, where another one is preferred");
  require(!providers.same_takes(single_grad, single), "nobody, where nobody computes it");
}

void test_the_environment_variable_goes_before_the_default() {
  setenv("BLOCKDIAG_TEST_GEMM", "picky", /*overwrite=*/1);
  require(Providers(three(), "BLOCKDIAG_TEST_GEMM", "fallback").preferred() == "picky", "the variable is read");
  setenv("BLOCKDIAG_TEST_GEMM", "", /*overwrite=*/1);
  require(Providers(three(), "BLOCKDIAG_TEST_GEMM", "fallback").preferred() == "fallback", "an empty one is unset");
  setenv("BLOCKDIAG_TEST_GEMM", "fast", /*overwrite=*/1);
  try {
    const Providers providers(three(), "BLOCKDIAG_TEST_GEMM", nullptr, " on this CPU");
    require(false, "an unknown name in the variable is an error");
  } catch (const std::invalid_argument& error) {
    const std::string expected =
        "blockdiag: expected BLOCKDIAG_TEST_GEMM to be one of [fallback, picky, kernels] on "
        "this CPU, but got \"fast\"";
    require(error.what() == expected, "which names the variable");
  }
}

} // namespace

int main() {
  test_the_first_that_takes_a_problem_computes_it();
  test_those_before_the_preferred_one_are_left_out();
  test_who_computes_a_problem_is_asked_about_another();
  test_the_environment_variable_goes_before_the_default();
  std::puts("all passed");
}
