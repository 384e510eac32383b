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

/// Defines the switch behind blockdiag/backends: sets the preferred provider, if a name is given, and returns its name.
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

/// The primitives of blockdiag/backends/tuning.py.
void define_tuning(py::module_& m) {
  m.def("cublaslt_version", &cublasLtGetVersion);
  m.def(
      "small_blocks_split_rows", [](int64_t rows) { return cuda::small_blocks_split_rows().exchange(rows); },
      "Sets the number of rows from which small blocks' sums over the batch are split, for benchmarks; returns the old "
      "one."
  );
  m.attr("PROBLEM_FIELDS") = cuda::LtProblem::kFields;
  m.def(
      "count_tuning",
      [](int used, int unmeasured) {
        cuda::tuning().used += used;
        cuda::tuning().unmeasured += unmeasured;
      },
      "Adds to the counts of callers that use measured choices, and of those that allow no new measurements."
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
      "All choices: device name, problem key and algorithm bytes."
  );
  m.def(
      "add_choice",
      [](const std::string& device, const cuda::LtProblem::Key& problem, const cuda::Choice& choice) {
        cuda::choices().get({device, problem}, [&] { return choice; });
      },
      "Adds a choice, unless the problem has one."
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
