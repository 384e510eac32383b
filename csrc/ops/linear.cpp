#include "linear.h"

#include "check.h"
#include "scalar_type.h"

#include <ATen/ops/_unsafe_view.h>
#include <c10/util/Exception.h>
#include <c10/util/irange.h>

#include <utility>

namespace blockdiag {
namespace {

LinearSizes check_sizes(const char* op, c10::SymIntArrayRef input, c10::SymIntArrayRef weight) {
  TORCH_CHECK(
      weight.size() == 3, op,
      ": expected weight to have 3 dimensions (num_blocks, out_block, in_block), but got shape ", weight
  );
  TORCH_CHECK(!input.empty(), op, ": expected input to have at least 1 dimension, but got a scalar");
  LinearSizes sizes{1, weight[0], weight[2], weight[1], false, {}};
  const auto& [batch, num_blocks, in_block, out_block, stacked, output] = sizes;
  // Each factor first, so that the products do not overflow.
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
        before_last.sym_eq(num_blocks), op, ": expected input's last two dimensions to be (num_blocks, in_block) = (",
        num_blocks, ", ", in_block, "), but got (", before_last, ", ", last, ")"
    );
  } else {
    TORCH_SYM_CHECK(
        last.sym_eq(in_features), op, ": expected input's last dimension to be num_blocks * in_block = ", num_blocks,
        " * ", in_block, " = ", in_features, ", but got ", last
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
      op, ": expected bias to have shape (num_blocks * out_block,) = (", out_features,
      ",) or (num_blocks, out_block) = (", sizes.num_blocks, ", ", sizes.out_block, "), but got shape ", bias
  );
}

void check_grad_output(const char* op, c10::SymIntArrayRef grad_output, const LinearSizes& sizes) {
  TORCH_CHECK(
      grad_output == c10::SymIntArrayRef(sizes.output), op, ": expected grad_output to have the output's shape ",
      c10::SymIntArrayRef(sizes.output), ", but got ", grad_output
  );
}

} // namespace

bool is_stacked(int64_t dims, const c10::SymInt& last, c10::SymIntArrayRef weight_sizes) {
  const auto& num_blocks = weight_sizes[0];
  const auto& in_block = weight_sizes[2];
  return dims >= 2 && !TORCH_GUARD_OR_FALSE(last.sym_eq(num_blocks * in_block)) &&
         TORCH_GUARD_OR_FALSE(last.sym_eq(in_block));
}

LinearSizes check_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  constexpr const char* op = "blockdiag::linear";
  auto sizes = check_sizes(op, input.sym_sizes(), weight.sym_sizes());
  if (bias) {
    check_bias(op, bias->sym_sizes(), sizes);
    check_dtypes_and_devices(op, {{"input", &input}, {"weight", &weight}, {"bias", &*bias}}, out_dtype);
  } else {
    check_dtypes_and_devices(op, {{"input", &input}, {"weight", &weight}}, out_dtype);
  }
  return sizes;
}

LinearSizes check_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  constexpr const char* op = "blockdiag::linear_input_grad";
  auto sizes = check_sizes(op, input_sizes, weight.sym_sizes());
  check_grad_output(op, grad_output.sym_sizes(), sizes);
  check_dtypes_and_devices(op, {{"grad_output", &grad_output}, {"weight", &weight}}, out_dtype);
  return sizes;
}

LinearSizes check_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  constexpr const char* op = "blockdiag::linear_weight_grad";
  auto sizes = check_sizes(op, input.sym_sizes(), weight_sizes);
  check_grad_output(op, grad_output.sym_sizes(), sizes);
  check_dtypes_and_devices(op, {{"grad_output", &grad_output}, {"input", &input}}, out_dtype);
  return sizes;
}

// ---- Lowering -------------------------------------------------------------------------------------------------------

namespace {

/// LinearSizes of real tensors.
struct Sizes {
  int64_t batch, num_blocks, in_block, out_block;
  bool stacked;

  explicit Sizes(const LinearSizes& sizes)
      : batch(sizes.batch.expect_int()),
        num_blocks(sizes.num_blocks.expect_int()),
        in_block(sizes.in_block.expect_int()),
        out_block(sizes.out_block.expect_int()),
        stacked(sizes.stacked) {}
};

/// Row-major matrices of a contiguous activation: the blocks are side by side in each row.
Blocks contiguous_activation(const Sizes& sizes, int64_t block) {
  return {sizes.batch, block, sizes.num_blocks * block, 1, block};
}

/// Row-major matrices of a contiguous weight.
Blocks contiguous_weight(const Sizes& sizes) {
  return {sizes.out_block, sizes.in_block, sizes.in_block, 1, sizes.out_block * sizes.in_block};
}

/// The stride that steps through all leading dimensions of `tensor` as one, or nothing if there is none.
std::optional<int64_t> batch_stride(const at::Tensor& tensor, int64_t leading_dims) {
  std::optional<int64_t> inner; // the innermost stride over more than one element
  int64_t next = 0;
  for (int64_t dim = leading_dims - 1; dim >= 0; --dim) {
    const int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 1) {
      continue;
    }
    if (inner && stride != next) {
      return std::nullopt;
    }
    inner = inner.value_or(stride);
    next = stride * size;
  }
  return inner.value_or(0);
}

/// The memory layout of `tensor`, (*, num_blocks * block) or (*, num_blocks, block).
std::optional<Blocks> activation_blocks(const at::Tensor& tensor, const Sizes& sizes, int64_t block) {
  const int64_t leading_dims = tensor.dim() - (sizes.stacked ? 2 : 1);
  const auto row_stride = batch_stride(tensor, leading_dims);
  if (!row_stride) {
    return std::nullopt;
  }
  const int64_t col_stride = tensor.stride(-1);
  const int64_t block_stride = sizes.stacked ? tensor.stride(-2) : block * col_stride;
  return Blocks{sizes.batch, block, *row_stride, col_stride, block_stride};
}

Blocks weight_blocks(const at::Tensor& weight) {
  return {weight.size(1), weight.size(2), weight.stride(1), weight.stride(2), weight.stride(0)};
}

Placed place_activation(const at::Tensor& tensor, const Sizes& sizes, int64_t block) {
  return place(tensor, activation_blocks(tensor, sizes, block), contiguous_activation(sizes, block));
}

Placed place_weight(const at::Tensor& weight, const Sizes& sizes) {
  return place(weight, weight_blocks(weight), contiguous_weight(sizes));
}

c10::DimVector as_ints(c10::SymIntArrayRef sizes) {
  const auto ints = C10_AS_INTARRAYREF_SLOW(sizes);
  return {ints.begin(), ints.end()};
}

/// The product of placed operands. Without an `out_dtype`, all have one dtype. With it, the product is computed in the
/// half type of an operand or of the result, if there is one, and Float32 marks those that are float32.
Product describe(
    const Gemm& gemm, Placed a, Placed b, at::Tensor bias, std::optional<at::ScalarType> out_dtype,
    c10::DimVector result_sizes
) {
  DType dtype = dtype_of(a.tensor);
  Float32 float32;
  if (out_dtype) {
    for (const auto type : {b.tensor.scalar_type(), *out_dtype}) {
      dtype = is_half(dtype) ? dtype : find_dtype(type).value();
    }
    if (dtype == DType::kFloat32 && bias.defined()) {
      bias = bias.to(at::kFloat);
    }
    const auto widened = [&](at::ScalarType type) { return is_half(dtype) && type == at::kFloat; };
    float32 = {
        .a = widened(a.tensor.scalar_type()),
        .b = widened(b.tensor.scalar_type()),
        .c = widened(*out_dtype),
        .bias = bias.defined() && widened(bias.scalar_type()),
    };
  }
  return {
      .problem = {.gemm = gemm, .dtype = dtype, .epilogue = {.bias = bias.defined()}, .float32 = float32},
      .a = std::move(a.tensor),
      .b = std::move(b.tensor),
      .bias = std::move(bias),
      .result_sizes = std::move(result_sizes),
  };
}

Product lower_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype
) {
  const auto checked = check_linear(input, weight, bias, out_dtype);
  const Sizes sizes(checked);
  auto x = place_activation(input, sizes, sizes.in_block);
  auto w = place_weight(weight, sizes);
  const auto y = contiguous_activation(sizes, sizes.out_block);
  const auto gemm = describe_product(x.blocks, w.blocks.transposed(), y, sizes.num_blocks);
  auto b = bias ? bias->contiguous() : at::Tensor();
  return describe(gemm, std::move(w), std::move(x), std::move(b), out_dtype, as_ints(checked.output));
}

Product lower_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const Sizes sizes(check_linear_input_grad(grad_output, weight, input_sizes, out_dtype));
  auto dy = place_activation(grad_output, sizes, sizes.out_block);
  auto w = place_weight(weight, sizes);
  const auto dx = contiguous_activation(sizes, sizes.in_block);
  const auto gemm = describe_product(dy.blocks, w.blocks, dx, sizes.num_blocks);
  return describe(gemm, std::move(w), std::move(dy), /*bias=*/{}, out_dtype, as_ints(input_sizes));
}

Product lower_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  const Sizes sizes(check_linear_weight_grad(grad_output, input, weight_sizes, out_dtype));
  auto dy = place_activation(grad_output, sizes, sizes.out_block);
  auto x = place_activation(input, sizes, sizes.in_block);
  const auto dw = contiguous_weight(sizes);
  const auto gemm = describe_product(dy.blocks.transposed(), x.blocks, dw, sizes.num_blocks);
  return describe(gemm, std::move(x), std::move(dy), /*bias=*/{}, out_dtype, as_ints(weight_sizes));
}

} // namespace

// ---- Computation ----------------------------------------------------------------------------------------------------

namespace {

/// The product that `lower(tensors, out_dtype)` describes, or of tensors cast to out_dtype if no provider takes these.
/// `rounds`: for a float32 result, operands may be rounded to the half type of another.
template <typename Lower>
Product lower_or_cast(
    const Lower& lower, Tensors tensors, std::optional<at::ScalarType> out_dtype, bool rounds, const Providers& backend
) {
  auto product = lower(tensors, out_dtype);
  if (takes(backend, product)) {
    return product;
  }
  const bool narrow = rounds && takes_if_cast(backend, product);
  cast(tensors, narrow ? scalar_type_of(product.problem.dtype) : *out_dtype);
  return lower(tensors, narrow ? out_dtype : std::nullopt);
}

/// Whether the forward pass computed in a half type, as under autocast. A float32 gradient may be beyond its range.
bool is_rounded(const at::Tensor& grad_output) { return at::isReducedFloatingType(grad_output.scalar_type()); }

} // namespace

at::Tensor compute_linear(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
) {
  const auto lower = [&](const Tensors& tensors, auto dtype) {
    return lower_linear(tensors[0], tensors[1], bias ? std::optional(tensors[2]) : std::nullopt, dtype);
  };
  const Tensors tensors{input, weight, bias.value_or(at::Tensor())};
  return compute(lower_or_cast(lower, tensors, out_dtype, /*rounds=*/false, backend), backend);
}

at::Tensor compute_linear_input_grad(
    const at::Tensor& grad_output, const at::Tensor& weight, c10::SymIntArrayRef input_sizes,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
) {
  const auto lower = [&](const Tensors& tensors, auto dtype) {
    return lower_linear_input_grad(tensors[0], tensors[1], input_sizes, dtype);
  };
  return compute(lower_or_cast(lower, {grad_output, weight}, out_dtype, is_rounded(grad_output), backend), backend);
}

at::Tensor compute_linear_weight_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
) {
  const auto lower = [&](const Tensors& tensors, auto dtype) {
    return lower_linear_weight_grad(tensors[0], tensors[1], weight_sizes, dtype);
  };
  return compute(lower_or_cast(lower, {grad_output, input}, out_dtype, is_rounded(grad_output), backend), backend);
}

at::Tensor bias_grad(
    const at::Tensor& grad_output, bool stacked, bool bias_stacked, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  c10::SmallVector<int64_t, 5> leading;
  for (const auto dim : c10::irange(grad_output.dim() - (stacked ? 2 : 1))) {
    leading.push_back(dim);
  }
  // A copy if there is nothing to sum: a parameter's gradient must not alias the incoming gradient. A sum has the
  // layout of its argument, which may be transposed.
  const auto dtype = out_dtype.value_or(grad_output.scalar_type());
  // torch casts before it sums: to a wider dtype first, to a narrower one last.
  const auto sum_dtype = c10::promoteTypes(dtype, grad_output.scalar_type());
  auto sum = !leading.empty()
                 ? grad_output.sum(leading, /*keepdim=*/false, sum_dtype).contiguous().to(dtype)
                 : grad_output.to(dtype, /*non_blocking=*/false, /*copy=*/true, at::MemoryFormat::Contiguous);
  if (stacked == bias_stacked) {
    return sum;
  }
  // The sum has no other owner, so the view need not be tracked as one.
  return bias_stacked ? at::_unsafe_view_symint(sum, {weight_sizes[0], weight_sizes[1]})
                      : at::_unsafe_view_symint(sum, {weight_sizes[0] * weight_sizes[1]});
}

std::tuple<at::Tensor, at::Tensor> separate_weight_and_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype
) {
  auto weight_grad = linear_weight_grad(grad_output, input, weight_sizes, out_dtype);
  const bool stacked = is_stacked(input.sym_sizes(), weight_sizes);
  return {std::move(weight_grad), bias_grad(grad_output, stacked, /*bias_stacked=*/true, weight_sizes, out_dtype)};
}

std::tuple<at::Tensor, at::Tensor> compute_linear_weight_bias_grad(
    const at::Tensor& grad_output, const at::Tensor& input, c10::SymIntArrayRef weight_sizes,
    std::optional<at::ScalarType> out_dtype, const Providers& backend
) {
  const auto lower = [&](const Tensors& tensors, auto dtype) {
    return lower_linear_weight_grad(tensors[0], tensors[1], weight_sizes, dtype);
  };
  auto product = lower_or_cast(lower, {grad_output, input}, out_dtype, is_rounded(grad_output), backend);
  // A gradient that was cast is summed as it was.
  product.problem.epilogue.bias_grad = product.b.scalar_type() == grad_output.scalar_type();
  if (product.problem.epilogue.bias_grad) {
    if (auto grads = compute_with_bias_grad(product, backend)) {
      return std::move(*grads);
    }
  }
  product.problem.epilogue.bias_grad = false;
  auto weight_grad = compute(product, backend);
  const bool stacked = is_stacked(input.sym_sizes(), weight_sizes);
  auto sum = bias_grad(grad_output, stacked, /*bias_stacked=*/stacked, weight_sizes, out_dtype);
  const auto& gemm = product.problem.gemm;
  sum.unsafeGetTensorImpl()->set_sizes_contiguous({gemm.batch, gemm.n}); // a view would be a call of the dispatcher
  return {std::move(weight_grad), std::move(sum)};
}

} // namespace blockdiag
