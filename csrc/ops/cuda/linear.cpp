#include "ops/linear.h"
#include "cuda/backend.h"
#include "cuda/kernels/cast.h"
#include "scalar_type.h"

#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace blockdiag::cuda {
namespace {

at::Tensor linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(input.device());
  return compute_linear(input, weight, bias, out_dtype, backend());
}

at::Tensor linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(grad_output.device());
  return compute_linear_input_grad(grad_output, weight, input_sizes, out_dtype, backend());
}

at::Tensor linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(grad_output.device());
  return compute_linear_weight_grad(grad_output, input, weight_sizes, out_dtype, backend());
}

std::tuple<at::Tensor, at::Tensor> linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::DeviceGuard guard(grad_output.device());
  return compute_linear_weight_bias_grad(grad_output, input, weight_sizes, out_dtype, backend());
}

/// Whether gradients of float32 tensors need no casts, so that the op's own, in one launch, are all there are. Autocast
/// has a launch for each of both.
bool converts(DType /*half*/) { return fuses(); }

/// One launch for all tensors that are dense in memory.
void cast_at_once(Tensors& tensors, at::ScalarType dtype) {
  const auto half = find_dtype(dtype).value();
  Casts casts{};
  size_t count = 0;
  for (auto& tensor : tensors) {
    if (!tensor.defined() || tensor.scalar_type() == dtype) {
      continue;
    }
    const bool narrows = tensor.scalar_type() == at::kFloat && is_half(half) && converts(half);
    if (!narrows || !tensor.is_non_overlapping_and_dense()) {
      tensor = tensor.to(dtype);
      continue;
    }
    auto result = at::empty_like(tensor, tensor.options().dtype(dtype), at::MemoryFormat::Preserve);
    casts.at[count++] = {tensor.const_data_ptr<float>(), result.mutable_data_ptr(), tensor.numel()};
    tensor = std::move(result); // its float32 memory is another owner's
  }
  if (count > 0) {
    cast_to_half(casts, half);
  }
}

const bool registered = register_mixing(at::kCUDA, {.converts = converts, .cast = cast_at_once});

} // namespace
} // namespace blockdiag::cuda

TORCH_LIBRARY_IMPL(blockdiag, CUDA, m) {
  m.impl("linear", TORCH_FN(blockdiag::cuda::linear));
  m.impl("linear_input_grad", TORCH_FN(blockdiag::cuda::linear_input_grad));
  m.impl("linear_weight_grad", TORCH_FN(blockdiag::cuda::linear_weight_grad));
  m.impl("linear_weight_bias_grad", TORCH_FN(blockdiag::cuda::linear_weight_bias_grad));
}
