// Tensors that no op supports, by dispatch key, and the workaround for each.
#include "ops/schemas.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <vector>

namespace {

using c10::DispatchKey;

constexpr const char* kToDense =
    "dense strided tensors, but got one of %. Convert it first: a sparse or mkldnn tensor by .to_dense(), a quantized "
    "one by .dequantize(), a nested one of torch.strided layout into one of torch.jagged, which blockdiag.linear and "
    "BlockDiagLinear take";

#ifndef BLOCKDIAG_CUDA
constexpr const char* kNoCuda =
    "a build of blockdiag with CUDA for CUDA tensors, but this one is for CPUs only. Build it again beside a CUDA "
    "build of torch, with nvcc on the PATH: FORCE_CUDA=1 pip install --no-build-isolation --no-cache-dir "
    "--force-reinstall --no-deps .";
#endif

struct Unsupported {
  DispatchKey key;
  const char* expected; // % stands for the key
};

constexpr std::array kUnsupported = {
    Unsupported{DispatchKey::SparseCPU, kToDense},
    Unsupported{DispatchKey::SparseCUDA, kToDense},
    Unsupported{DispatchKey::SparseCsrCPU, kToDense},
    Unsupported{DispatchKey::SparseCsrCUDA, kToDense},
    Unsupported{DispatchKey::QuantizedCPU, kToDense},
    Unsupported{DispatchKey::QuantizedCUDA, kToDense},
    Unsupported{DispatchKey::MkldnnCPU, kToDense},
    // Before autograd, which queries sizes that nested tensors do not have.
    Unsupported{DispatchKey::AutogradNestedTensor, kToDense},
    Unsupported{DispatchKey::NestedTensorCPU, kToDense},
    Unsupported{DispatchKey::NestedTensorCUDA, kToDense},
#ifndef BLOCKDIAG_CUDA
    Unsupported{DispatchKey::CUDA, kNoCuda},
#endif
};

void raise(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* /*stack*/) {
  const auto key = keys.highestPriorityTypeId();
  for (const auto& row : kUnsupported) {
    if (row.key == key) {
      std::string expected = row.expected;
      if (const auto place = expected.find('%'); place != std::string::npos) {
        expected.replace(place, 1, c10::toString(key));
      }
      TORCH_CHECK_NOT_IMPLEMENTED(false, op.operator_name().name, ": expected ", expected);
    }
  }
  TORCH_INTERNAL_ASSERT(false, "registered for the keys of the table alone");
}

std::vector<torch::Library> register_all() {
  std::vector<torch::Library> libraries;
  for (const auto& row : kUnsupported) {
    auto& library = libraries.emplace_back(torch::Library::IMPL, "blockdiag", row.key, __FILE__, __LINE__);
    for (const std::string schema : blockdiag::kSchemas) {
      library.impl(schema.substr(0, schema.find('(')).c_str(), torch::CppFunction::makeFromBoxedFunction<&raise>());
    }
  }
  return libraries;
}

const std::vector<torch::Library> registered = register_all();

} // namespace
