"""Linear layers and convolutions become products of low rank."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from blockdiag._surgery.duplicate import random_state_kept
from blockdiag.compression.checks import CONVOLUTIONS, LINEARS
from blockdiag.compression.config import Selected
from blockdiag.compression.factors import Factorized
from blockdiag.nn import LowRankConv, LowRankLinear


@dataclass(frozen=True)
class LowRank(Factorized):
    """Linear layers become :class:`~blockdiag.LowRankLinear`, convolutions :class:`~blockdiag.LowRankConv`.

    Convolutions have 1 to 3 dimensions, and may be grouped. Only layers that then need fewer operations are replaced.
    Without ``calibration`` the product is the truncated singular value decomposition of the weight (Eckart and Young,
    1936), with it reduced-rank regression (Izenman, 1975) of the layer's outputs, with the bias adjusted. Layers that
    are of low rank already are projected to a lower one, whatever ``min_features`` is.

    :class:`torch.nn.MultiheadAttention` reads the weight of its output projection instead of calling the layer:
    compressed, it saves parameters there, but no operations, as the report says; with ``budget`` it is left alone.
    Apply :func:`~blockdiag.split_attention` first to have four projections that are called.

    Args:
        rank: number of features between the factors; below 1 the fraction of the smaller of the layer's numbers of
            inputs and outputs; channels of each group of a convolution. Default: 0.25, or as ``max_error`` or
            ``budget`` decide.
        max_error: takes the smallest rank whose relative error is at most that, for each layer; see
            :class:`~blockdiag.compression.LayerReport`.
        min_features: leaves linear layers with fewer input or output features, and convolutions with fewer input or
            output channels, alone.

    Raises:
        TypeError: a value is not a number.
        ValueError: a value is out of range, or there are both ``rank`` and ``max_error``.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 3), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 1))
        >>> config = blockdiag.LowRank(rank=0.25, min_features=0)
        >>> model, report = blockdiag.compress(model, config, progress=False)
        >>> model[0].rank, model[2].rank
        (8, 16)
        >>> lower, report = blockdiag.compress(model, blockdiag.LowRank(rank=4), progress=False)
        >>> lower[0].rank, lower[2].rank
        (4, 4)
    """

    rank: float | None = None
    max_error: float | None = None
    min_features: int = 256

    takes = (*LINEARS, *CONVOLUTIONS, LowRankLinear, LowRankConv)
    makes = (LowRankLinear, LowRankConv)

    def num_blocks_of(self, selected: Selected) -> tuple[int, int]:
        return 1, 1

    def rank_of(self, layer: Any, largest: int) -> int:
        if hasattr(layer, "in_channels"):
            sizes = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        else:
            sizes = layer.in_features, layer.out_features
        return self.as_rank(self.rank or 0.25, min(sizes))

    def empty(self, old: Any, num_blocks: tuple[int, int], rank: int) -> nn.Module:
        if hasattr(old, "in_channels"):
            with random_state_kept():  # made on the meta device, it would lose its memory format
                return LowRankConv.from_conv(old, rank)
        return empty_low_rank_linear(old, rank)


def empty_low_rank_linear(old: Any, rank: int) -> LowRankLinear:
    parameter = next(old.parameters())
    layer = LowRankLinear(old.in_features, old.out_features, rank, old.bias is not None, "meta", parameter.dtype)
    return layer.to_empty(device=parameter.device)
