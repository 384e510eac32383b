"""The layer over several processes: sharding rules for DTensor, and a style for tensor parallelism by blocks.

The blocks are independent, so a layer whose weight and bias are sharded over their first dimension, and whose
concatenated activations are sharded over their last one, needs no communication at all. Importing this module registers
the rules.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.parallel import ParallelStyle

from blockdiag.nn import BlockDiagLinear, PermutedBlockDiagLinear

__all__ = ["BlockParallel", "shard_placement"]

# One way to shard an op over one dimension of a mesh: the placements of its outputs and of its arguments.
Sharding = tuple[list[Placement], list[Placement | None]]


def _feature_dim(activation: Any, num_features: int) -> int:
    """The dimension of an activation that runs over the blocks: the last one if concatenated, else the one before."""
    return len(activation.shape) - (1 if activation.shape[-1] == num_features else 2)


def _splits(num_blocks: int, mesh: DeviceMesh) -> bool:
    """Whether all shards are of whole blocks, and of equally many."""
    return all(num_blocks % size == 0 for size in mesh.shape)


def _shard_linear(input: Any, weight: Any, bias: Any = None) -> list[Sharding]:
    num_blocks, _, in_block = weight.shape
    feature_dim = _feature_dim(input, num_blocks * in_block)

    def sharding(output: Placement, input: Placement, weight: Placement) -> Sharding:
        return [output], [input, weight, None if bias is None else weight]

    shardings = [sharding(Replicate(), Replicate(), Replicate())]
    shardings += [sharding(Shard(dim), Shard(dim), Replicate()) for dim in range(feature_dim)]
    if _splits(num_blocks, weight.mesh):
        shardings.append(sharding(Shard(feature_dim), Shard(feature_dim), Shard(0)))
    return shardings


def _shard_linear_input_grad(grad_output: Any, weight: Any, input_sizes: Sequence[int]) -> list[Sharding]:
    num_blocks, out_block, _ = weight.shape
    feature_dim = _feature_dim(grad_output, num_blocks * out_block)
    shardings: list[Sharding] = [([Replicate()], [Replicate(), Replicate(), None])]
    shardings += [([Shard(dim)], [Shard(dim), Replicate(), None]) for dim in range(feature_dim)]
    if _splits(num_blocks, weight.mesh):
        shardings.append(([Shard(feature_dim)], [Shard(feature_dim), Shard(0), None]))
    return shardings


def _shard_linear_weight_grad(grad_output: Any, input: Any, weight_sizes: Sequence[int]) -> list[Sharding]:
    num_blocks, _, in_block = weight_sizes
    feature_dim = _feature_dim(input, num_blocks * in_block)
    shardings: list[Sharding] = [([Replicate()], [Replicate(), Replicate(), None])]
    shardings += [([Partial()], [Shard(dim), Shard(dim), None]) for dim in range(feature_dim)]
    if _splits(num_blocks, input.mesh):
        shardings.append(([Shard(0)], [Shard(feature_dim), Shard(feature_dim), None]))
    return shardings


def _register() -> None:
    ops = torch.ops.blockdiag
    register_sharding(ops.linear.default)(_shard_linear)
    register_sharding(ops.linear_input_grad.default)(_shard_linear_input_grad)
    register_sharding(ops.linear_weight_grad.default)(_shard_linear_weight_grad)
    # Their third argument is the size of the result: of its local part, where each shard computes its own.
    propagator = DTensor._op_dispatcher.sharding_propagator
    for op in (ops.linear_input_grad.default, ops.linear_weight_grad.default):
        propagator.op_to_shape_and_stride_idx[op] = 2
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(static_argnum=2)  # that list is to be kept as one


_register()


def shard_placement(world_size: int) -> Callable[[nn.Parameter], Shard]:
    """For :func:`torch.distributed.fsdp.fully_shard`: spreads parameters where there are fewer blocks than ranks.

    Sharded over its blocks, as it is by default, a weight of 2 blocks leaves all but 2 ranks empty.

    Args:
        world_size: the number of ranks that a parameter is sharded over.

    Returns:
        A ``shard_placement_fn``: the first dimension of a parameter that is a multiple of `world_size`; the first of
        all if there is none.

    Example::

        >>> import blockdiag
        >>> from blockdiag.distributed import shard_placement
        >>> place = shard_placement(world_size=8)  # fully_shard(model, shard_placement_fn=place)
        >>> place(blockdiag.BlockDiagLinear(64, 128, num_blocks=2).weight)  # of shape (2, 64, 32)
        Shard(dim=1)
    """

    def place(parameter: nn.Parameter) -> Shard:
        return Shard(next((dim for dim, size in enumerate(parameter.shape) if size % world_size == 0), 0))

    return place


class BlockParallel(ParallelStyle):
    """Splits a :class:`~blockdiag.BlockDiagLinear`, permuted or not, by blocks over a device mesh of one dimension.

    For :func:`torch.distributed.tensor.parallel.parallelize_module`. Weight and bias are sharded over the blocks, and
    so are the features of input and output. Consecutive layers of one number of blocks, with pointwise functions
    between them, exchange nothing between their processes.

    Args:
        input_layouts: placement of inputs that are not DTensors. Default: ``Replicate()``. Inputs of another placement
            than by blocks are redistributed.
        output_layouts: placement of the output. Default: by blocks, as it is computed: ``Shard(-1)`` if concatenated,
            ``Shard(-2)`` if stacked.
        use_local_output: whether to return the local part as a plain tensor. Default: ``True``.

    Raises:
        TypeError: the module is neither a BlockDiagLinear nor a PermutedBlockDiagLinear.
        ValueError: the number of blocks is no multiple of the mesh's size.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from torch.distributed import HashStore, destroy_process_group, init_process_group
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor import Replicate, Shard
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from blockdiag import BlockDiagLinear
        >>> from blockdiag.distributed import BlockParallel
        >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # torchrun starts more
        >>> mesh = init_device_mesh("cpu", (1,))
        >>> model = nn.Sequential(BlockDiagLinear(512, 512, 8), nn.ReLU(), BlockDiagLinear(512, 80, 8))
        >>> styles = {"0": BlockParallel(), "2": BlockParallel(input_layouts=Shard(-1), output_layouts=Replicate())}
        >>> model = parallelize_module(model, mesh, styles)
        >>> model(torch.randn(32, 512)).shape
        torch.Size([32, 80])
        >>> destroy_process_group()
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts = input_layouts or Replicate()
        self.output_layouts = output_layouts
        self.use_local_output = use_local_output

    @staticmethod
    def _shard(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            sharded = distribute_tensor(parameter, mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(sharded, requires_grad=parameter.requires_grad))

    def _prepare_input(self, module: Any, inputs: Any, mesh: DeviceMesh) -> Any:
        (input,) = inputs
        if not isinstance(input, DTensor):
            input = DTensor.from_local(input, mesh, [self.input_layouts], run_check=False)
        return input.redistribute(placements=[Shard(_feature_dim(input, module.in_features))])

    def _prepare_output(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        if self.output_layouts is not None:
            output = output.redistribute(placements=[self.output_layouts])
        return output.to_local() if self.use_local_output else output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, BlockDiagLinear | PermutedBlockDiagLinear):
            raise TypeError(f"BlockParallel: expected a BlockDiagLinear, but got {type(module).__name__}")
        if module.num_blocks % device_mesh.size() != 0:
            raise ValueError(
                f"BlockParallel: expected num_blocks to be a multiple of the mesh's size {device_mesh.size()}, "
                f"but got {module.num_blocks}"
            )
        return distribute_module(module, device_mesh, self._shard, self._prepare_input, self._prepare_output)
