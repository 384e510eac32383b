"""Block-diagonal linear layers for PyTorch: many independent linear layers as one operation."""

from blockdiag._load import extension
from blockdiag.backends.tuning import preferred_cuda_gemm, tune, tune_from_environment
from blockdiag.compression import BlockDiagonal, LowRank, Monarch, compress, split_attention
from blockdiag.ensemble import stack_linears, stack_models
from blockdiag.functional import linear
from blockdiag.nn import BlockDiagLinear, LowRankConv, LowRankLinear, MonarchLinear, PermutedBlockDiagLinear
from blockdiag.registration.flops import register_flop_formulas
from blockdiag.registration.onnx import register_translation
from blockdiag.registration.vmap import register_batching_rules

__all__ = [
    "BlockDiagLinear",
    "BlockDiagonal",
    "LowRank",
    "LowRankConv",
    "LowRankLinear",
    "Monarch",
    "MonarchLinear",
    "PermutedBlockDiagLinear",
    "build_info",
    "compress",
    "linear",
    "preferred_cuda_gemm",
    "split_attention",
    "stack_linears",
    "stack_models",
    "tune",
]

build_info = extension.build_info
__version__: str = build_info()["version"]
register_batching_rules()
register_flop_formulas()
register_translation()
tune_from_environment()
