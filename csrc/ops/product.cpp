#include "product.h"

#include "scalar_type.h"

#include <ATen/ops/empty.h>

#include <array>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

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

/// Asks for huge pages, if the system leaves that to programs.
void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

at::Tensor empty_result(const Product& product) {
  auto result = at::empty(product.result_sizes, result_options(product));
  // glibc's malloc maps such sizes anew in each call, and every page faults when it is first written. All of the result
  // is written at once, so huge pages waste no memory.
  constexpr size_t kMappedBytes = 32 << 20;
  if (result.is_cpu() && result.nbytes() >= kMappedBytes) {
    advise_huge_pages(result.mutable_data_ptr(), result.nbytes());
  }
  return result;
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

namespace {

std::array<Mixing, at::COMPILE_TIME_MAX_DEVICE_TYPES> mixing_by_device{};

const Mixing& mixing_of(at::DeviceType device) { return mixing_by_device[static_cast<size_t>(device)]; }

} // namespace

bool register_mixing(at::DeviceType device, Mixing mixing) {
  mixing_by_device[static_cast<size_t>(device)] = mixing;
  return true;
}

bool converts(at::DeviceType device, DType half) {
  const auto function = mixing_of(device).converts;
  return function != nullptr && function(half);
}

void cast(Tensors& tensors, at::ScalarType dtype) {
  if (const auto at_once = mixing_of(tensors[0].device().type()).cast) {
    at_once(tensors, dtype);
    return;
  }
  for (auto& tensor : tensors) {
    tensor = tensor.defined() ? tensor.to(dtype) : tensor;
  }
}

bool takes(const Providers& backend, const Product& product) {
  return !product.problem.float32.any() || is_empty(product.problem.gemm) || backend.take(product.problem);
}

bool takes_if_cast(const Providers& backend, const Product& product) {
  auto problem = product.problem;
  problem.float32 = {.c = problem.float32.c};
  return backend.take(problem);
}

at::Tensor compute(const Product& product, const Providers& backend) {
  auto result = empty_result(product);
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
  auto result = empty_result(product);
  auto bias_grad = at::empty({gemm.batch, gemm.n}, result.options());
  if (!run(product, backend, result, bias_grad.mutable_data_ptr())) {
    return std::nullopt;
  }
  return std::pair(std::move(result), std::move(bias_grad));
}

} // namespace blockdiag
