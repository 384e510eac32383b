// Refuses tensors whose elements do not lie where strides say, and names the way round.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

namespace {

void refuse(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false,
      op.operator_name().name,
      ": expected dense strided tensors, but got one of ",
      c10::toString(keys.highestPriorityTypeId()),
      ". Convert it first: a sparse or mkldnn tensor by .to_dense(), a quantized one by .dequantize(), a nested one of "
      "torch.strided layout into one of torch.jagged, which blockdiag.linear and BlockDiagLinear take"
  );
}

void refuse_all(torch::Library& m) {
  for (const char* op : {"linear", "linear_input_grad", "linear_weight_grad"}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&refuse>());
  }
}

} // namespace

TORCH_LIBRARY_IMPL(blockdiag, SparseCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, SparseCUDA, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, SparseCsrCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, SparseCsrCUDA, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, QuantizedCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, QuantizedCUDA, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, MkldnnCPU, m) {
  refuse_all(m);
}
// Before autograd, which asks for sizes that nested tensors do not have.
TORCH_LIBRARY_IMPL(blockdiag, AutogradNestedTensor, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, NestedTensorCPU, m) {
  refuse_all(m);
}
TORCH_LIBRARY_IMPL(blockdiag, NestedTensorCUDA, m) {
  refuse_all(m);
}
