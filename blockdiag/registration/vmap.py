"""Batching rules: :func:`torch.vmap` calls them instead of the ops, once for the whole batch.

A batched activation alone has one more leading dimension. If the weight, or its gradient, is batched too, V layers of G
blocks become one layer of V * G blocks; block-sparse layers then run one by one. Results have the batch dimension in
front and are contiguous, so that the mapped function also sees contiguous results, as the ops promise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch.library import register_vmap
from torch.utils._pytree import tree_map

from blockdiag.registration.layout import feature_dims

ops = torch.ops.blockdiag


def _side_by_side(tensor: Tensor, batch_dim: int | None, batch_size: int, feature_dims: int) -> Tensor:
    """Moves the batch dimension into the features: (*, V * features), from (*, features) batched at any dimension."""
    if batch_dim is None:
        tensor, batch_dim = tensor.expand(batch_size, *tensor.shape), 0
    return tensor.movedim(batch_dim, -1 - feature_dims).flatten(-1 - feature_dims)


def _one_by_one(tensor: Tensor, batch_size: int, features: Sequence[int]) -> Tensor:
    """The inverse: (V, *, features), from (*, V * features)."""
    return tensor.unflatten(-1, (batch_size, *features)).movedim(-1 - len(features), 0).contiguous()


def _blocks(weight: Tensor, batch_dim: int) -> Tensor:
    """The weights of V layers as one weight of V * G blocks."""
    return weight.movedim(batch_dim, 0).flatten(0, 1)


def _shape(tensor: Tensor, batch_dim: int | None) -> list[int]:
    return [size for dim, size in enumerate(tensor.shape) if dim != batch_dim]


def _fits(input: Sequence[int], weight: Sequence[int], bias: Sequence[int] | None) -> bool:
    """Whether the op takes tensors of these shapes."""
    if len(weight) != 3 or not input:
        return False
    num_blocks, out_block, in_block = weight
    features = [num_blocks * in_block] if feature_dims(input, weight) == 1 else [num_blocks, in_block]
    biases: list[Any] = [None, [num_blocks * out_block], [num_blocks, out_block]]
    return list(input[-len(features) :]) == features and bias in biases


def linear(
    info: Any, in_dims: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: Any = None
) -> tuple[Tensor, int]:
    input_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    shape, weight_shape = _shape(input, input_dim), _shape(weight, weight_dim)
    bias_shape = None if bias is None else _shape(bias, bias_dim)
    if not _fits(shape, weight_shape, bias_shape) or (bias is not None and bias.dtype != weight.dtype):
        # The whole batch may fit nevertheless. The op says what is wrong with a sample, if anything is.
        pairs = ((input, input_dim), (weight, weight_dim), (bias, bias_dim))
        sample = (each if each is None or dim is None else each.select(dim, 0) for each, dim in pairs)
        ops.linear(*sample, out_dtype=out_dtype)
    num_blocks, out_block = weight_shape[:2]
    dims = feature_dims(shape, weight_shape)
    features = (num_blocks * out_block,) if dims == 1 else (num_blocks, out_block)
    if weight_dim is None:
        shared = bias if bias_dim is None else None
        result_dtype = None if torch.is_autocast_enabled(weight.device.type) else out_dtype or weight.dtype
        accepted = out_dtype is not None or input.dtype == weight.dtype  # or else the op says so
        if bias is not None and shared is None and accepted and result_dtype in (torch.float16, torch.bfloat16):
            out_dtype = torch.float32  # for a sum that is rounded once, with the bias
        if input_dim is None:
            output = ops.linear(input, weight, shared, out_dtype=out_dtype)
            output = output.expand(info.batch_size, *shape[:-dims], *features)
        else:
            output = ops.linear(input.movedim(input_dim, 0), weight, shared, out_dtype=out_dtype)
        if bias is not None and bias_dim is not None:
            ones = [1] * (len(shape) - dims)
            bias = bias.movedim(bias_dim, 0).reshape(info.batch_size, *ones, *features)
            output = (output + bias.to(output.dtype)).to(result_dtype or output.dtype).contiguous()
        return output, 0
    if bias is not None:
        bias = _side_by_side(bias, bias_dim, info.batch_size, bias.dim() - (bias_dim is not None))
    rows = _side_by_side(input, input_dim, info.batch_size, dims)
    output = ops.linear(rows, _blocks(weight, weight_dim), bias, out_dtype=out_dtype)
    return _one_by_one(output, info.batch_size, features), 0


def linear_input_grad(
    info: Any, in_dims: Any, grad_output: Tensor, weight: Tensor, input_sizes: Sequence[int], *, out_dtype: Any = None
) -> tuple[Tensor, int]:
    grad_dim, weight_dim, _ = in_dims
    if weight_dim is None:
        rows, sizes = grad_output.movedim(grad_dim, 0), [info.batch_size, *input_sizes]
        return ops.linear_input_grad(rows, weight, sizes, out_dtype=out_dtype), 0
    num_blocks, out_block, in_block = (size for dim, size in enumerate(weight.shape) if dim != weight_dim)
    dims = feature_dims(input_sizes, (num_blocks, out_block, in_block))
    rows = _side_by_side(grad_output, grad_dim, info.batch_size, dims)
    sizes = [*rows.shape[:-1], info.batch_size * num_blocks * in_block]
    grad = ops.linear_input_grad(rows, _blocks(weight, weight_dim), sizes, out_dtype=out_dtype)
    return _one_by_one(grad, info.batch_size, input_sizes[-dims:]), 0


def _weight_grad(
    op: Any, info: Any, in_dims: Any, grad_output: Tensor, input: Tensor, weight_sizes: Sequence[int], **out_dtype: Any
) -> Any:
    grad_dim, input_dim, _ = in_dims
    num_blocks, out_block, in_block = weight_sizes
    shape = [size for dim, size in enumerate(input.shape) if dim != input_dim]
    dims = feature_dims(shape, weight_sizes)
    rows = [
        _side_by_side(tensor, dim, info.batch_size, dims)
        for tensor, dim in ((grad_output, grad_dim), (input, input_dim))
    ]
    grads = op(*rows, [info.batch_size * num_blocks, out_block, in_block], **out_dtype)
    return tree_map(lambda grad: grad.unflatten(0, (info.batch_size, num_blocks)), grads)


def linear_weight_grad(info: Any, in_dims: Any, *args: Any, **out_dtype: Any) -> tuple[Tensor, int]:
    return _weight_grad(ops.linear_weight_grad, info, in_dims, *args, **out_dtype), 0


def linear_weight_bias_grad(
    info: Any, in_dims: Any, *args: Any, **out_dtype: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    return _weight_grad(ops.linear_weight_bias_grad, info, in_dims, *args, **out_dtype), (0, 0)


def _sample_by_sample(op: Any, info: Any, in_dims: Any, *args: Any) -> Any:
    """A call for each sample, where each has positions or values of its own; results are stacked."""
    samples = [
        [arg if dim is None else arg.select(dim, index) for arg, dim in zip(args, in_dims, strict=True)]
        for index in range(info.batch_size)
    ]
    if samples:
        return tree_map(lambda *each: torch.stack(each), *(op(*sample) for sample in samples))
    # Shapes alone.
    meta: list[Any] = [arg if arg is None else arg.to("meta") for arg in args]
    one = [arg if dim is None else arg.new_empty(_shape(arg, dim)) for arg, dim in zip(meta, in_dims, strict=True)]
    return tree_map(lambda result: args[0].new_empty((0, *result.shape)), op(*one))


def sparse_linear(
    info: Any,
    in_dims: Any,
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    diagonal: Tensor | None = None,
) -> tuple[Tensor, int]:
    args = (input, values, crow_indices, col_indices, bias, diagonal)
    in_dims = (*in_dims, *[None] * 6)[:6]
    if in_dims[0] is not None and in_dims[1:] == (None,) * 5 and input.dim() > 1:
        return ops.sparse_linear(input.movedim(in_dims[0], 0), *args[1:]), 0
    return _sample_by_sample(ops.sparse_linear, info, in_dims, *args), 0


def sparse_linear_input_grad(
    info: Any,
    in_dims: Any,
    grad_output: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    input_sizes: Sequence[int],
) -> tuple[Tensor, int]:
    if tuple(in_dims[1:4]) == (None,) * 3:
        rows, sizes = grad_output.movedim(in_dims[0], 0), [info.batch_size, *input_sizes]
        return ops.sparse_linear_input_grad(rows, values, crow_indices, col_indices, sizes), 0

    def op(*tensors: Tensor) -> Tensor:
        return ops.sparse_linear_input_grad(*tensors, input_sizes)

    return _sample_by_sample(op, info, in_dims[:4], grad_output, values, crow_indices, col_indices), 0


def sparse_linear_values_grad(
    info: Any,
    in_dims: Any,
    grad_output: Tensor,
    input: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values_sizes: Sequence[int],
) -> tuple[Tensor, int]:
    def op(*tensors: Tensor) -> Tensor:
        return ops.sparse_linear_values_grad(*tensors, values_sizes)

    return _sample_by_sample(op, info, in_dims[:4], grad_output, input, crow_indices, col_indices), 0


def _recurrent(op: Any, info: Any, in_dims: Any, activations: int, *args: Any) -> Any:
    """`activations`: those of the arguments whose first one has a dimension of time before that of the batch."""
    in_dims = (*in_dims, *[None] * len(args))[: len(args)]
    if any(dim is not None for dim in in_dims[activations:]):
        return _sample_by_sample(op, info, in_dims, *args), 0
    moved = []
    for index, (arg, dim) in enumerate(zip(args[:activations], in_dims, strict=False)):
        to = 1 if index == 0 else 0
        moved.append(arg.movedim(dim, to) if dim is not None else _expanded(arg, info.batch_size, to))
    return op(*moved, *args[activations:]), None


def _expanded(tensor: Tensor, size: int, dim: int) -> Tensor:
    return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], size, *tensor.shape[dim:])


def sparse_gru(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    output, dim = _recurrent(ops.sparse_gru, info, in_dims, 2, *args)
    return output, 1 if dim is None else dim


def sparse_lstm(info: Any, in_dims: Any, *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    outputs, dim = _recurrent(ops.sparse_lstm, info, in_dims, 3, *args)
    return outputs, (1, 0) if dim is None else (dim, dim)


_RULES = (
    linear,
    linear_input_grad,
    linear_weight_grad,
    linear_weight_bias_grad,
    sparse_linear,
    sparse_linear_input_grad,
    sparse_linear_values_grad,
    sparse_gru,
    sparse_lstm,
)


def register_batching_rules() -> None:
    """Idempotent: if the package is imported again, the first rules stay."""
    for rule in _RULES:
        if not getattr(ops, rule.__name__).default.has_kernel_for_dispatch_key(DispatchKey.FuncTorchBatched):
            register_vmap(f"blockdiag::{rule.__name__}", rule)
