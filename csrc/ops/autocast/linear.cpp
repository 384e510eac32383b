// Autocast: blockdiag::linear computes in autocast's dtype. The backward ops need no rule: they run in the dtypes of the
// forward pass, inside and outside of autocast regions.
#include "include/blockdiag.h"
#include "ops/product.h"
#include "scalar_type.h"

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>

namespace blockdiag {
namespace {

/// Whether the op takes the tensors as they are: float32 or of a half type, as autocast's dtype is.
bool takes(at::ScalarType dtype, std::initializer_list<const at::Tensor*> tensors) {
  return at::isReducedFloatingType(dtype) && std::all_of(tensors.begin(), tensors.end(), [&](const auto* tensor) {
           return tensor->scalar_type() == dtype || tensor->scalar_type() == at::kFloat;
         });
}

template <at::DeviceType device_type>
at::Tensor autocast_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device_type)
  );
  if (out_dtype) { // says what to compute in
    return blockdiag::linear(input, weight, bias, out_dtype);
  }
  const auto dtype = at::autocast::get_autocast_dtype(device_type);
  // Libraries that convert as they read and write need no casts. For others, casts that are cached until the context
  // ends are better than the op's own.
  if (takes(dtype, {&input, &weight, bias ? &*bias : &weight}) && converts(device_type, find_dtype(dtype).value())) {
    return blockdiag::linear(input, weight, bias, dtype);
  }
  // As autocast casts the arguments of torch.nn.functional.linear.
  return blockdiag::linear(
      at::autocast::cached_cast(dtype, input, device_type), at::autocast::cached_cast(dtype, weight, device_type),
      at::autocast::cached_cast(dtype, bias, device_type)
  );
}

} // namespace
} // namespace blockdiag

TORCH_LIBRARY_IMPL(blockdiag, AutocastCPU, m) { m.impl("linear", TORCH_FN(blockdiag::autocast_linear<at::kCPU>)); }

TORCH_LIBRARY_IMPL(blockdiag, AutocastCUDA, m) { m.impl("linear", TORCH_FN(blockdiag::autocast_linear<at::kCUDA>)); }
