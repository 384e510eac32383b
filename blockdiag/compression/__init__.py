"""From dense models to block-diagonal and factorized ones."""

from blockdiag.compression.attention import SplitAttention, split_attention
from blockdiag.compression.convert import Conversion
from blockdiag.compression.factorize import factorize, lower_rank
from blockdiag.compression.replace import replace_linear
from blockdiag.compression.report import ConversionReport, Cost, LayerReport, Step

__all__ = [
    "Conversion",
    "ConversionReport",
    "Cost",
    "LayerReport",
    "SplitAttention",
    "Step",
    "factorize",
    "lower_rank",
    "replace_linear",
    "split_attention",
]
