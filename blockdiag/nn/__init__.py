"""The structured layers as modules."""

from blockdiag.nn.block_diag_linear import BlockDiagLinear
from blockdiag.nn.factors import LowRankConv, LowRankLinear, MonarchLinear, PermutedBlockDiagLinear

__all__ = ["BlockDiagLinear", "LowRankConv", "LowRankLinear", "MonarchLinear", "PermutedBlockDiagLinear"]
