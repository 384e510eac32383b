"""Block-diagonal linear layers for PyTorch: many independent linear layers as one operation."""

from blockdiag._load import extension
from blockdiag.flops import register_flop_formulas
from blockdiag.functional import linear
from blockdiag.modules import BlockDiagLinear
from blockdiag.vmap import register_batching_rules

__all__ = ["BlockDiagLinear", "build_info", "linear"]

build_info = extension.build_info
__version__: str = build_info()["version"]
register_batching_rules()
register_flop_formulas()
