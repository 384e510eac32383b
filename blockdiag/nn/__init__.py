"""The structured layers, as modules."""

from blockdiag.nn.block_diag_linear import BlockDiagLinear
from blockdiag.nn.block_sparse_linear import BlockSparseLinear
from blockdiag.nn.block_sparse_rnn import BlockSparseGRU, BlockSparseLSTM
from blockdiag.nn.low_rank_conv import LowRankConv
from blockdiag.nn.low_rank_linear import LowRankLinear
from blockdiag.nn.monarch_linear import MonarchLinear
from blockdiag.nn.permuted_block_diag_linear import PermutedBlockDiagLinear

__all__ = [
    "BlockDiagLinear",
    "BlockSparseGRU",
    "BlockSparseLSTM",
    "BlockSparseLinear",
    "LowRankConv",
    "LowRankLinear",
    "MonarchLinear",
    "PermutedBlockDiagLinear",
]
