// The Python module: importing it registers the ops.
#include "blockdiag.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled part of blockdiag. Importing it registers torch.ops.blockdiag.";
  m.def("build_info", &blockdiag::build_info, "What this module was built with, and the CPU library that it found.");
}
