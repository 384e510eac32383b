// Casts the arguments of blockdiag::linear as autocast casts those of torch.nn.functional.linear. The backward ops need
// no rule: they run in the dtype of the forward pass, inside and outside of autocast regions.
#include "include/blockdiag.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

namespace blockdiag {
namespace {

template <at::DeviceType device_type>
at::Tensor autocast_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device_type)
  );
  const auto dtype = at::autocast::get_autocast_dtype(device_type);
  return blockdiag::linear(
      at::autocast::cached_cast(dtype, input, device_type), at::autocast::cached_cast(dtype, weight, device_type),
      at::autocast::cached_cast(dtype, bias, device_type)
  );
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, AutocastCPU, m) { m.impl("linear", TORCH_FN(blockdiag::autocast_linear<at::kCPU>)); }

TORCH_LIBRARY_IMPL(blockdiag, AutocastCUDA, m) { m.impl("linear", TORCH_FN(blockdiag::autocast_linear<at::kCUDA>)); }
