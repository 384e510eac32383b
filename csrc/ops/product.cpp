#include "product.h"

#include "scalar_type.h"

#include <ATen/ops/empty.h>

namespace blockdiag {
namespace {

bool run(const Product& product, const Providers& backend, const at::Tensor& result, void* bias_grad) {
  return backend.run(
      product.problem, {.a = product.a.const_data_ptr(),
                        .b = product.b.const_data_ptr(),
                        .c = result.mutable_data_ptr(),
                        .bias = product.bias.defined() ? product.bias.const_data_ptr() : nullptr,
                        .bias_grad = bias_grad}
  );
}

at::TensorOptions result_options(const Product& product) {
  const auto& problem = product.problem;
  return product.a.options().dtype(problem.float32.c ? at::kFloat : scalar_type_of(problem.dtype));
}

bool is_empty(const Gemm& gemm) { return gemm.m == 0 || gemm.n == 0 || gemm.k == 0 || gemm.batch == 0; }

} // namespace

Placed place(const at::Tensor& tensor, const std::optional<Blocks>& blocks, const Blocks& contiguous) {
  if (tensor.is_contiguous()) {
    return {tensor, contiguous};
  }
  if (blocks && transposed_operand(*blocks)) {
    return {tensor, *blocks};
  }
  return {tensor.contiguous(), contiguous};
}

bool takes(const Providers& backend, const Product& product) {
  return !product.problem.float32.any() || is_empty(product.problem.gemm) || backend.take(product.problem);
}

at::Tensor compute(const Product& product, const Providers& backend) {
  auto result = at::empty(product.result_sizes, result_options(product));
  if (result.numel() == 0) {
    return result;
  }
  if (product.problem.gemm.k != 0) {
    const bool done = run(product, backend, result, /*bias_grad=*/nullptr);
    TORCH_INTERNAL_ASSERT(done, "the last provider takes every product");
  } else if (product.bias.defined()) {
    result.view({-1, product.bias.numel()}).copy_(product.bias.view(-1));
  } else {
    result.zero_();
  }
  return result;
}

std::optional<std::pair<at::Tensor, at::Tensor>> compute_with_bias_grad(
    const Product& product, const Providers& backend
) {
  const auto& gemm = product.problem.gemm;
  if (is_empty(gemm) || !backend.take(product.problem)) {
    return std::nullopt;
  }
  const auto options = result_options(product);
  auto result = at::empty(product.result_sizes, options);
  auto bias_grad = at::empty({gemm.batch, gemm.n}, options);
  if (!run(product, backend, result, bias_grad.mutable_data_ptr())) {
    return std::nullopt;
  }
  return std::pair(std::move(result), std::move(bias_grad));
}

} // namespace blockdiag
