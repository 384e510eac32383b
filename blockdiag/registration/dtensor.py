"""Sharding rules of the ops for :class:`torch.distributed.tensor.DTensor`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding

from blockdiag.registration.layout import feature_dims

# A sharding of an op over one dimension of a mesh: the placements of its outputs and of its arguments.
Sharding = tuple[list[Placement], list[Placement | None]]


def feature_dim(input: Any, weight_shape: Sequence[int]) -> int:
    """The dimension of an input, or of its output, that contains the blocks."""
    return len(input.shape) - feature_dims(input.shape, weight_shape)


def _splits(num_blocks: int, mesh: DeviceMesh) -> bool:
    """Whether all shards have equally many whole blocks."""
    return all(num_blocks % size == 0 for size in mesh.shape)


def _shard_linear(input: Any, weight: Any, bias: Any = None, **out_dtype: Any) -> list[Sharding]:
    blocks_dim = feature_dim(input, weight.shape)

    def sharding(output: Placement, input: Placement, weight: Placement) -> Sharding:
        return [output], [input, weight, None if bias is None else weight]

    shardings = [sharding(Replicate(), Replicate(), Replicate())]
    shardings += [sharding(Shard(dim), Shard(dim), Replicate()) for dim in range(blocks_dim)]
    if _splits(weight.shape[0], weight.mesh):
        shardings.append(sharding(Shard(blocks_dim), Shard(blocks_dim), Shard(0)))
    return shardings


def _shard_linear_input_grad(
    grad_output: Any, weight: Any, input_sizes: Sequence[int], **out_dtype: Any
) -> list[Sharding]:
    blocks_dim = len(input_sizes) - feature_dims(input_sizes, weight.shape)
    shardings: list[Sharding] = [([Replicate()], [Replicate(), Replicate(), None])]
    shardings += [([Shard(dim)], [Shard(dim), Replicate(), None]) for dim in range(blocks_dim)]
    if _splits(weight.shape[0], weight.mesh):
        shardings.append(([Shard(blocks_dim)], [Shard(blocks_dim), Shard(0), None]))
    return shardings


def _shard_linear_weight_grad(
    grad_output: Any, input: Any, weight_sizes: Sequence[int], **out_dtype: Any
) -> list[Sharding]:
    blocks_dim = feature_dim(input, weight_sizes)
    shardings: list[Sharding] = [([Replicate()], [Replicate(), Replicate(), None])]
    shardings += [([Partial()], [Shard(dim), Shard(dim), None]) for dim in range(blocks_dim)]
    if _splits(weight_sizes[0], input.mesh):
        shardings.append(([Shard(0)], [Shard(blocks_dim), Shard(blocks_dim), None]))
    return shardings


# Block-sparse layers are sharded over the batch; their blocks are not.


def _shard_sparse_linear(
    input: Any, values: Any, crow_indices: Any, col_indices: Any, bias: Any = None, diagonal: Any = None
) -> list[Sharding]:
    weight: list[Placement | None] = [None if each is None else Replicate() for each in (bias, diagonal)]
    return [([rows], [rows, *[Replicate()] * 3, *weight]) for rows in _over_batch(input.shape)]


def _shard_sparse_linear_input_grad(grad_output: Any, *args: Any) -> list[Sharding]:
    return [([rows], [rows, *[Replicate()] * 3, None]) for rows in _over_batch(grad_output.shape)]


def _shard_sparse_linear_values_grad(grad_output: Any, *args: Any) -> list[Sharding]:
    return [
        ([Partial() if isinstance(rows, Shard) else Replicate()], [rows, rows, Replicate(), Replicate(), None])
        for rows in _over_batch(grad_output.shape)
    ]


def _over_batch(shape: Sequence[int]) -> list[Placement]:
    return [Replicate(), *(Shard(dim) for dim in range(len(shape) - 1))]


def _weight_bias_grad(op: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Calls the separate ops: DTensor localizes an argument's sizes only for ops with one result."""
    grad_output, input, weight_sizes = args
    grad = torch.ops.blockdiag.linear_weight_grad(grad_output, input, weight_sizes, **kwargs)
    leading = list(range(feature_dim(input, weight_sizes)))
    # torch casts before it sums: to a wider dtype first, to a narrower one last.
    wide = torch.promote_types(grad.dtype, grad_output.dtype)
    bias_grad = grad_output.sum(leading, dtype=wide) if leading else grad_output.clone()
    return grad, bias_grad.to(grad.dtype).view(weight_sizes[:2])


def register_sharding_rules() -> None:
    """Registers the rules with DTensor. Idempotent."""
    ops = torch.ops.blockdiag
    register_sharding(ops.linear.default)(_shard_linear)
    register_sharding(ops.linear_input_grad.default)(_shard_linear_input_grad)
    register_sharding(ops.linear_weight_grad.default)(_shard_linear_weight_grad)
    register_sharding(ops.sparse_linear.default)(_shard_sparse_linear)
    register_sharding(ops.sparse_linear_input_grad.default)(_shard_sparse_linear_input_grad)
    register_sharding(ops.sparse_linear_values_grad.default)(_shard_sparse_linear_values_grad)
    dispatcher: Any = DTensor._op_dispatcher
    dispatcher._custom_op_handlers[ops.linear_weight_bias_grad.default] = _weight_bias_grad
    # An argument is the size of the result, which must be local if each shard computes its own part.
    for op, sizes in (
        (ops.linear_input_grad, 2),
        (ops.linear_weight_grad, 2),
        (ops.sparse_linear_input_grad, 4),
        (ops.sparse_linear_values_grad, 4),
    ):
        dispatcher.sharding_propagator.op_to_shape_and_stride_idx[op.default] = sizes
        # Keep the list of sizes as one argument.
        info = RuntimeSchemaInfo(static_argnum=sizes, static_kwargkey=["out_dtype"])
        dispatcher.sharding_propagator.op_to_schema_info[op.default] = info
