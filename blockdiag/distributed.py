"""Distributed training: a style for tensor parallelism by blocks, and placements for FSDP.

The blocks are independent, so a layer whose weight and bias are sharded over their first dimension, and whose
concatenated activations are sharded over their last one, needs no communication at all. Importing this module registers
the sharding rules.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from blockdiag.nn import BlockDiagLinear, PermutedBlockDiagLinear
from blockdiag.registration.dtensor import feature_dim, register_sharding_rules

__all__ = ["BlockParallel", "shard_placement"]

register_sharding_rules()


def shard_placement(world_size: int) -> Callable[[nn.Parameter], Shard]:
    """A placement for :func:`torch.distributed.fsdp.fully_shard` with fewer blocks than ranks.

    The default shards a weight over its blocks: 2 blocks leave all but 2 ranks empty.

    Args:
        world_size: the number of ranks to shard parameters over.

    Returns:
        A ``shard_placement_fn``: shards the first dimension of a parameter that is a multiple of `world_size`, or else
        dimension 0.

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
    """Splits a :class:`~blockdiag.BlockDiagLinear`, permuted or not, by blocks over a one-dimensional device mesh.

    For :func:`torch.distributed.tensor.parallel.parallelize_module`. Weight, bias, and the features of input and
    output are sharded over the blocks. Consecutive layers with equal numbers of blocks and pointwise functions between
    them need no communication.

    Args:
        input_layouts: placement of inputs that are not DTensors. Default: ``Replicate()``. Inputs that are not sharded
            by blocks are redistributed.
        output_layouts: placement of the output. Default: by blocks, without communication: ``Shard(-1)`` if
            concatenated, ``Shard(-2)`` if stacked.
        use_local_output: whether to return the local part as a plain tensor. Default: ``True``.

    Raises:
        TypeError: the module is neither a BlockDiagLinear nor a PermutedBlockDiagLinear.
        ValueError: the number of blocks is not a multiple of the mesh's size.

    Example::

        >>> import torch
        >>> from torch import nn
        >>> from torch.distributed import HashStore, destroy_process_group, init_process_group
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor import Replicate, Shard
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from blockdiag import BlockDiagLinear
        >>> from blockdiag.distributed import BlockParallel
        >>> init_process_group("gloo", store=HashStore(), rank=0, world_size=1)  # torchrun starts several
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
        return input.redistribute(placements=[Shard(feature_dim(input, module.weight.shape))])

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
