// The Python module: importing it registers the ops.
#include "blockdiag.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifdef BLOCKDIAG_CUDA
#include "cuda/gemm.h"
#include "cuda/small_blocks.h"
#include "cuda/tune.h"

namespace {

namespace cuda = blockdiag::cuda;

/// What blockdiag/backends/tuning.py is made of.
void define_tuning(pybind11::module_& m) {
  m.def("preferred_cuda_gemm", &cuda::preferred_gemm, pybind11::arg("name") = pybind11::none());
  m.def("cublaslt_version", &cublasLtGetVersion);
  m.def(
      "small_blocks_split_rows",
      [](int64_t rows) { return cuda::small_blocks_split_rows().exchange(rows); },
      "Sets from how many rows on small blocks' sums over the batch are split, for benchmarks; returns what it was."
  );
  m.attr("PROBLEM_FIELDS") = cuda::Problem::kFields;
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
        std::vector<std::tuple<std::string, cuda::Problem::Key, cuda::Choice>> all;
        for (const auto& [key, choice] : cuda::choices().entries()) {
          all.emplace_back(key.device, key.problem, *choice);
        }
        return all;
      },
      "All choices: device, and numbers of the problem and of the algorithm."
  );
  m.def(
      "add_choice",
      [](const std::string& device, const cuda::Problem::Key& problem, const cuda::Choice& choice) {
        cuda::choices().get({device, problem}, [&] { return choice; });
      },
      "Adds a choice, where there is none for the problem."
  );
}

} // namespace
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of blockdiag. Importing it registers torch.ops.blockdiag.";
  m.def("build_info", &blockdiag::build_info, "What this module was built with, and the CPU library that it found.");
#ifdef BLOCKDIAG_CUDA
  define_tuning(m);
#endif
}
