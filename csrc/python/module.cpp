// The Python module: importing it registers the ops.
#include "cpu/backend.h"
#include "include/blockdiag.h"
#include "ops/linear.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#ifdef BLOCKDIAG_CUDA
#include "cuda/backend.h"
#include "cuda/cublaslt/tuning.h"
#include "cuda/kernels/small_blocks.h"
#endif

namespace {

namespace py = pybind11;

/// What blockdiag/backends chooses by: the preferred provider, after preferring the one named, if any.
void define_preferred(py::module_& m, const char* name, blockdiag::Providers& (*backend)()) {
  m.def(
      name,
      [backend](const std::optional<std::string>& preferred) {
        if (preferred) {
          backend().prefer(*preferred);
        }
        return backend().preferred();
      },
      py::arg("name") = py::none()
  );
}

#ifdef BLOCKDIAG_CUDA

namespace cuda = blockdiag::cuda;

/// What blockdiag/backends/tuning.py is made of.
void define_tuning(py::module_& m) {
  m.def("cublaslt_version", &cublasLtGetVersion);
  m.def(
      "small_blocks_split_rows", [](int64_t rows) { return cuda::small_blocks_split_rows().exchange(rows); },
      "Sets from how many rows on small blocks' sums over the batch are split, for benchmarks; returns what it was."
  );
  m.attr("PROBLEM_FIELDS") = cuda::LtProblem::kFields;
  m.def(
      "count_tuning",
      [](int used, int unmeasured) {
        cuda::tuning().used += used;
        cuda::tuning().unmeasured += unmeasured;
      },
      "Adds to the numbers of those who want measured choices used, and of those who want nothing measured."
  );
  m.def(
      "choices",
      [] {
        std::vector<std::tuple<std::string, cuda::LtProblem::Key, cuda::Choice>> all;
        for (const auto& [key, choice] : cuda::choices().entries()) {
          all.emplace_back(key.device, key.problem, *choice);
        }
        return all;
      },
      "All choices: device, and numbers of the problem and of the algorithm."
  );
  m.def(
      "add_choice",
      [](const std::string& device, const cuda::LtProblem::Key& problem, const cuda::Choice& choice) {
        cuda::choices().get({device, problem}, [&] { return choice; });
      },
      "Adds a choice, where there is none for the problem."
  );
}

#endif

} // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of blockdiag. Importing it registers torch.ops.blockdiag.";
  m.def("build_info", &blockdiag::build_info, "What this module was built with, and what it found when it was loaded.");
  m.def(
      "is_stacked",
      [](int64_t dims, const c10::SymInt& last, const std::vector<c10::SymInt>& weight_sizes) {
        return blockdiag::is_stacked(dims, last, weight_sizes);
      },
      "Whether the op reads an input of so many dimensions, the last of this size, as stacked."
  );
  define_preferred(m, "preferred_cpu_library", &blockdiag::cpu::backend);
#ifdef BLOCKDIAG_CUDA
  define_preferred(m, "preferred_cuda_library", &cuda::backend);
  define_tuning(m);
#endif
}
