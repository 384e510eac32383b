"""What :class:`torch.utils.flop_counter.FlopCounterMode` counts for the ops: two operations for each product."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def linear(input_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(input_shape) * weight_shape[1]


def linear_input_grad(grad_output_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad_output_shape) * weight_shape[2]


def linear_weight_grad(
    grad_output_shape: Sequence[int], input_shape: Sequence[int], weight_sizes: Sequence[int], **_: Any
) -> int:
    return 2 * math.prod(grad_output_shape) * weight_sizes[2]


def register_flop_formulas() -> None:
    for formula in (linear, linear_input_grad, linear_weight_grad):
        register_flop_formula(getattr(torch.ops.blockdiag, formula.__name__))(formula)
    # Sums are not counted, as torch's own formulas do not.
    register_flop_formula(torch.ops.blockdiag.linear_weight_bias_grad)(linear_weight_grad)
