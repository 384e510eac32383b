// Autocast: casts as for torch.nn.functional.linear. The backward ops run in the dtype of the forward pass.
#include "include/blockdiag.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace blockdiag {
namespace {

template <at::DeviceType device_type>
at::Tensor autocast_sparse_linear(
    const at::Tensor& input, const at::Tensor& values, const at::Tensor& crow_indices, const at::Tensor& col_indices,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& diagonal
) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device_type)
  );
  const auto dtype = at::autocast::get_autocast_dtype(device_type);
  const auto cast = [&](const auto& tensor) { return at::autocast::cached_cast(dtype, tensor, device_type); };
  return sparse_linear(cast(input), cast(values), crow_indices, col_indices, cast(bias), cast(diagonal));
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, AutocastCPU, m) {
  m.impl("sparse_linear", TORCH_FN(blockdiag::autocast_sparse_linear<at::kCPU>));
}

TORCH_LIBRARY_IMPL(blockdiag, AutocastCUDA, m) {
  m.impl("sparse_linear", TORCH_FN(blockdiag::autocast_sparse_linear<at::kCUDA>));
}
