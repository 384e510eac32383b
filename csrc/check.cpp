#include "check.h"

#include "gemm.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <initializer_list>
#include <utility>

namespace blockdiag {
namespace {

using NamedTensor = std::pair<const char*, const at::Tensor*>;

bool is_supported(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
    case at::kBFloat16:
    case at::kFloat:
    case at::kDouble:
    case at::kComplexFloat:
    case at::kComplexDouble:
      return true;
    default:
      return false;
  }
}

void check_dtypes_and_devices(const char* op, std::initializer_list<NamedTensor> tensors) {
  const auto& [first_name, first] = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    TORCH_CHECK(
        is_supported(tensor->scalar_type()),
        op,
        ": expected ",
        name,
        " to be float16, bfloat16, float32, float64, complex64 or complex128, but got ",
        c10::getDtypeNames(tensor->scalar_type()).first
    );
    TORCH_CHECK(
        tensor->scalar_type() == first->scalar_type(),
        op,
        ": expected ",
        name,
        " to have ",
        first_name,
        "'s dtype ",
        c10::getDtypeNames(first->scalar_type()).first,
        ", but got ",
        c10::getDtypeNames(tensor->scalar_type()).first
    );
    TORCH_CHECK(
        tensor->device() == first->device(),
        op,
        ": expected ",
        name,
        " to be on ",
        first_name,
        "'s device ",
        first->device(),
        ", but got ",
        tensor->device()
    );
  }
}

// Symbolic sizes pass: they are checked when the traced program runs on real ones.
void check_fits_blas(const char* op, const char* what, const c10::SymInt& size) {
  if (const auto value = size.maybe_as_int()) {
    TORCH_CHECK(
        *value <= kBlasMax, op, ": expected ", what, " to fit BLAS's 32-bit integers (", kBlasMax, "), but got ", *value
    );
  }
}

LinearSizes check_sizes(const char* op, c10::SymIntArrayRef input, c10::SymIntArrayRef weight) {
  TORCH_CHECK(
      weight.size() == 3,
      op,
      ": expected weight to have 3 dimensions (num_blocks, out_block, in_block), but got shape ",
      weight
  );
  TORCH_CHECK(!input.empty(), op, ": expected input to have at least 1 dimension, but got a scalar");
  LinearSizes sizes{1, weight[0], weight[2], weight[1], false, {}};
  const auto& [batch, num_blocks, in_block, out_block, stacked, output] = sizes;
  // Each by itself first, so that their products do not overflow.
  check_fits_blas(op, "num_blocks", num_blocks);
  check_fits_blas(op, "in_block", in_block);
  check_fits_blas(op, "out_block", out_block);
  sizes.stacked = is_stacked(input, weight);
  const auto in_features = num_blocks * in_block;
  const auto out_features = num_blocks * out_block;
  check_fits_blas(op, "in_features (num_blocks * in_block)", in_features);
  check_fits_blas(op, "out_features (num_blocks * out_block)", out_features);

  const auto& last = input.back();
  if (stacked) {
    const auto& before_last = input[input.size() - 2];
    TORCH_SYM_CHECK(
        before_last.sym_eq(num_blocks),
        op,
        ": expected input's last two dimensions to be (num_blocks, in_block) = (",
        num_blocks,
        ", ",
        in_block,
        "), but got (",
        before_last,
        ", ",
        last,
        ")"
    );
  } else {
    TORCH_SYM_CHECK(
        last.sym_eq(in_features),
        op,
        ": expected input's last dimension to be num_blocks * in_block = ",
        num_blocks,
        " * ",
        in_block,
        " = ",
        in_features,
        ", but got ",
        last
    );
  }

  const char* const batch_name = "the batch size (the product of input's leading dimensions)";
  for (const auto& size : input.slice(0, input.size() - (stacked ? 2 : 1))) {
    check_fits_blas(op, batch_name, size);
    sizes.batch *= size;
    check_fits_blas(op, batch_name, batch);
    sizes.output.push_back(size);
  }
  if (stacked) {
    sizes.output.push_back(num_blocks);
    sizes.output.push_back(out_block);
  } else {
    sizes.output.push_back(out_features);
  }
  return sizes;
}

void check_bias(const char* op, c10::SymIntArrayRef bias, const LinearSizes& sizes) {
  const auto out_features = sizes.num_blocks * sizes.out_block;
  TORCH_CHECK(
      (bias.size() == 1 && bias[0] == out_features) ||
          (bias.size() == 2 && bias[0] == sizes.num_blocks && bias[1] == sizes.out_block),
      op,
      ": expected bias to have shape (num_blocks * out_block,) = (",
      out_features,
      ",) or (num_blocks, out_block) = (",
      sizes.num_blocks,
      ", ",
      sizes.out_block,
      "), but got shape ",
      bias
  );
}

void check_grad_output(const char* op, c10::SymIntArrayRef grad_output, const LinearSizes& sizes) {
  TORCH_CHECK(
      grad_output == c10::SymIntArrayRef(sizes.output),
      op,
      ": expected grad_output to have the output's shape ",
      c10::SymIntArrayRef(sizes.output),
      ", but got ",
      grad_output
  );
}

} // namespace

bool is_stacked(c10::SymIntArrayRef input_sizes, c10::SymIntArrayRef weight_sizes) {
  const auto& num_blocks = weight_sizes[0];
  const auto& in_block = weight_sizes[2];
  const auto& last = input_sizes.back();
  return input_sizes.size() >= 2 && !TORCH_GUARD_OR_FALSE(last.sym_eq(num_blocks * in_block)) &&
         TORCH_GUARD_OR_FALSE(last.sym_eq(in_block));
}

LinearSizes check_linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  constexpr const char* op = "blockdiag::linear";
  auto sizes = check_sizes(op, input.sym_sizes(), weight.sym_sizes());
  if (bias) {
    check_bias(op, bias->sym_sizes(), sizes);
    check_dtypes_and_devices(op, {{"input", &input}, {"weight", &weight}, {"bias", &*bias}});
  } else {
    check_dtypes_and_devices(op, {{"input", &input}, {"weight", &weight}});
  }
  return sizes;
}

LinearSizes check_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes
) {
  constexpr const char* op = "blockdiag::linear_input_grad";
  auto sizes = check_sizes(op, input_sizes, weight.sym_sizes());
  check_grad_output(op, grad_output.sym_sizes(), sizes);
  check_dtypes_and_devices(op, {{"grad_output", &grad_output}, {"weight", &weight}});
  return sizes;
}

LinearSizes check_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes
) {
  constexpr const char* op = "blockdiag::linear_weight_grad";
  auto sizes = check_sizes(op, input.sym_sizes(), weight_sizes);
  check_grad_output(op, grad_output.sym_sizes(), sizes);
  check_dtypes_and_devices(op, {{"grad_output", &grad_output}, {"input", &input}});
  return sizes;
}

} // namespace blockdiag
