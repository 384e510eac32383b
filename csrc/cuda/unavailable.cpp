// Stands in for csrc/cuda/linear.cpp in a build without CUDA, to say how to get one with it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace {

void unavailable(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false,
      op.operator_name().name,
      ": expected a build of blockdiag with CUDA for CUDA tensors, but this one is for CPUs only. Build it again "
      "beside a "
      "CUDA build of torch, with nvcc on the PATH: FORCE_CUDA=1 pip install --no-build-isolation --no-cache-dir "
      "--force-reinstall --no-deps ."
  );
}

} // namespace

TORCH_LIBRARY_IMPL(blockdiag, CUDA, m) {
  m.impl("linear", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("linear_input_grad", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
  m.impl("linear_weight_grad", torch::CppFunction::makeFromBoxedFunction<&unavailable>());
}
