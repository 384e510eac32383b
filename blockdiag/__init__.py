"""Block-diagonal linear layers for PyTorch: many independent linear layers as one operation."""

from blockdiag._load import extension as _extension
from blockdiag.backends.tuning import tune_from_environment as _tune_from_environment
from blockdiag.compression import BlockDiagonal, BlockSparse, LowRank, Monarch, compress, split_attention
from blockdiag.ensemble import stack_models
from blockdiag.functional import linear, sparse_linear
from blockdiag.nn import (
    BlockDiagLinear,
    BlockSparseGRU,
    BlockSparseLinear,
    BlockSparseLSTM,
    LowRankConv,
    LowRankLinear,
    MonarchLinear,
    PermutedBlockDiagLinear,
)
from blockdiag.registration.flops import register_flop_formulas as _register_flop_formulas
from blockdiag.registration.onnx import register_translation as _register_translation
from blockdiag.registration.vmap import register_batching_rules as _register_batching_rules

__all__ = [
    "BlockDiagLinear",
    "BlockDiagonal",
    "BlockSparse",
    "BlockSparseGRU",
    "BlockSparseLSTM",
    "BlockSparseLinear",
    "LowRank",
    "LowRankConv",
    "LowRankLinear",
    "Monarch",
    "MonarchLinear",
    "PermutedBlockDiagLinear",
    "backends",
    "build_info",
    "compress",
    "compression",
    "ensemble",
    "functional",
    "linear",
    "nn",
    "registration",
    "sparse_linear",
    "split_attention",
    "stack_models",
]


def build_info() -> dict[str, str]:
    """What blockdiag was built with, and the libraries that compute.

    Returns:
        ``version``, ``torch`` and ``compiler`` that it was built as and with; ``cuda``, the version of CUDA, or
        ``"none"``; ``cpu_gemm``, the library that is asked first on this CPU, and ``cpu_gemms``, all that it has. A
        build with CUDA also has ``cuda_gemm``, ``cublas`` and ``cublaslt``.

    Example::

        >>> import blockdiag
        >>> info = blockdiag.build_info()
        >>> info["version"] == blockdiag.__version__
        True
    """
    return _extension.build_info()


__version__: str = build_info()["version"]
_register_batching_rules()
_register_flop_formulas()
_register_translation()
_tune_from_environment()
