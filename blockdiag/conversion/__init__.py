"""From dense models to block-diagonal and factorised ones, and back."""

from blockdiag.conversion.attention import SplitAttention, split_attention
from blockdiag.conversion.convert import Conversion
from blockdiag.conversion.factorize import factorize, lower_rank
from blockdiag.conversion.replace import replace_linear
from blockdiag.conversion.report import ConversionReport, Cost, LayerReport, Step
from blockdiag.conversion.stack import StackedModel, stack_linears, stack_models

__all__ = [
    "Conversion",
    "ConversionReport",
    "Cost",
    "LayerReport",
    "SplitAttention",
    "StackedModel",
    "Step",
    "factorize",
    "lower_rank",
    "replace_linear",
    "split_attention",
    "stack_linears",
    "stack_models",
]
