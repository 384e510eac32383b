"""Block-diagonal linear layers for PyTorch: many independent linear layers as one operation."""

from blockdiag._load import extension
from blockdiag.conversion import factorize, lower_rank, replace_linear, split_attention, stack_linears, stack_models
from blockdiag.factors import LowRankConv, LowRankLinear, MonarchLinear, PermutedBlockDiagLinear
from blockdiag.flops import register_flop_formulas
from blockdiag.functional import linear
from blockdiag.modules import BlockDiagLinear
from blockdiag.onnx import register_translation
from blockdiag.tuning import preferred_cuda_gemm, tune, tune_from_environment
from blockdiag.vmap import register_batching_rules

__all__ = [
    "BlockDiagLinear",
    "LowRankConv",
    "LowRankLinear",
    "MonarchLinear",
    "PermutedBlockDiagLinear",
    "build_info",
    "factorize",
    "linear",
    "lower_rank",
    "preferred_cuda_gemm",
    "replace_linear",
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
