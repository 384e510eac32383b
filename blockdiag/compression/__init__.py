"""From dense models to structured ones: :func:`compress`, its configs, and its report."""

from blockdiag.compression.attention import SplitAttention, split_attention
from blockdiag.compression.block_diagonal import BlockDiagonal
from blockdiag.compression.block_sparse import BlockSparse
from blockdiag.compression.compress import Compression, compress
from blockdiag.compression.config import Config
from blockdiag.compression.group_lasso import GroupLasso
from blockdiag.compression.low_rank import LowRank
from blockdiag.compression.monarch import Monarch
from blockdiag.compression.report import CompressionReport, Cost, LayerReport, Step

__all__ = [
    "BlockDiagonal",
    "BlockSparse",
    "Compression",
    "CompressionReport",
    "Config",
    "Cost",
    "GroupLasso",
    "LayerReport",
    "LowRank",
    "Monarch",
    "SplitAttention",
    "Step",
    "compress",
    "split_attention",
]
