"""Linear layers become Monarch products."""

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockdiag.compression.checks import LINEARS
from blockdiag.compression.config import Selected, as_whole, set_field
from blockdiag.compression.factors import Factorized
from blockdiag.compression.low_rank import empty_low_rank_linear
from blockdiag.nn import MonarchLinear


@dataclass(frozen=True)
class Monarch(Factorized):
    """Linear layers become :class:`~blockdiag.MonarchLinear`: two block-diagonal layers, with a permutation in between.

    The weight consists of submatrices of low rank, of which there are as many as the first factor's blocks times the
    second's; if that is one, the layer becomes a :class:`~blockdiag.LowRankLinear`, which :class:`~blockdiag.LowRank`
    compresses further. Only layers that then need fewer operations are replaced. Without ``calibration`` every
    submatrix is a truncated singular value decomposition, in closed form; with it the error of the layer's outputs is
    minimized by descent from there over the submatrices, with the bias adjusted. Monarch layers with these blocks are
    projected to a lower rank, whatever ``min_features`` is; those with others are left alone.

    What :class:`~blockdiag.LowRank` says of attention holds here too.

    Args:
        num_blocks: blocks of the first factor and of the second, or one number for both. Default: for each the largest
            divisor of the layer's inputs, or outputs, up to their square root.
        rank: rank of the submatrices; below 1 the fraction of the smaller of a submatrix's numbers of inputs and
            outputs. Default: 1, or as ``max_error`` or ``budget`` decide.
        max_error: takes the smallest rank whose relative error is at most that, for each layer; see
            :class:`~blockdiag.compression.LayerReport`.
        min_features: leaves layers with fewer input or output features alone.

    Raises:
        TypeError: a value is not a number, or ``num_blocks`` not an int, or two.
        ValueError: a value is out of range, or there are both ``rank`` and ``max_error``.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
        >>> model, report = blockdiag.compress(model, blockdiag.Monarch(rank=2), progress=False)
        >>> model[0]
        MonarchLinear(
          in_features=256, out_features=1024, num_blocks=(16, 32), rank=2
          (first): BlockDiagLinear(in_features=256, out_features=1024, num_blocks=16, bias=False)
          (second): BlockDiagLinear(in_features=1024, out_features=1024, num_blocks=32, bias=True)
        )
    """

    num_blocks: int | tuple[int, int] | None = None
    rank: float | None = None
    max_error: float | None = None
    min_features: int = 256

    takes = (*LINEARS, MonarchLinear)
    makes = (MonarchLinear,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.num_blocks, list | tuple):
            if len(self.num_blocks) != 2:
                raise ValueError(f"Monarch: expected num_blocks to be one number or two, but got {self.num_blocks}")
            set_field(self, "num_blocks", tuple(as_whole(self, "num_blocks", blocks, 1) for blocks in self.num_blocks))
        elif self.num_blocks is not None:
            set_field(self, "num_blocks", as_whole(self, "num_blocks", self.num_blocks, 1))

    def num_blocks_of(self, selected: Selected) -> tuple[int, int] | str:
        layer = selected.layer
        compressed: tuple[int, int] | None = getattr(layer, "num_blocks", None)
        if self.num_blocks is None:
            return compressed or (near_square_blocks(layer.in_features), near_square_blocks(layer.out_features))
        blocks = (self.num_blocks, self.num_blocks) if isinstance(self.num_blocks, int) else self.num_blocks
        if compressed is not None:
            return blocks if blocks == compressed else f"compressed already, with {compressed} blocks and not {blocks}"
        if layer.in_features % blocks[0] or layer.out_features % blocks[1]:
            raise ValueError(
                f"'{selected.name}' (in_features={layer.in_features}, out_features={layer.out_features}) cannot be "
                f"split into {blocks} equal blocks"
            )
        return blocks

    def rank_of(self, layer: Any, largest: int) -> int:
        return self.as_rank(self.rank or 1, largest)

    def empty(self, old: Any, num_blocks: tuple[int, int], rank: int) -> nn.Module:
        if num_blocks == (1, 1) and not isinstance(old, MonarchLinear):
            return empty_low_rank_linear(old, rank)
        parameter, bias = next(old.parameters()), old.bias is not None
        layer = MonarchLinear(old.in_features, old.out_features, num_blocks, rank, bias, "meta", parameter.dtype)
        return layer.to_empty(device=parameter.device)


def near_square_blocks(features: int) -> int:
    """The largest divisor of `features` up to its square root: as many blocks as Monarch's, or fewer."""
    return max(d for d in range(1, math.isqrt(max(features, 1)) + 1) if features % d == 0)
