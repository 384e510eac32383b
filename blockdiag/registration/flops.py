"""FLOP formulas of the ops for :class:`torch.utils.flop_counter.FlopCounterMode`: two per product."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula


def linear(input_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(input_shape) * weight_shape[1]


def linear_input_grad(grad_output_shape: Sequence[int], weight_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad_output_shape) * weight_shape[2]


def linear_weight_grad(
    grad_output_shape: Sequence[int], input_shape: Sequence[int], weight_sizes: Sequence[int], **_: Any
) -> int:
    return 2 * math.prod(grad_output_shape) * weight_sizes[2]


def sparse_linear(input_shape: Sequence[int], values_shape: Sequence[int], *args: Any, **_: Any) -> int:
    diagonal_shape = args[3] if len(args) > 3 and args[3] is not None else [0]
    return 2 * math.prod(input_shape[:-1]) * (math.prod(values_shape) + diagonal_shape[0])


def sparse_linear_input_grad(grad_output_shape: Sequence[int], values_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad_output_shape[:-1]) * math.prod(values_shape)


def sparse_linear_values_grad(
    grad_output_shape: Sequence[int], input_shape: Sequence[int], *args: Any, **_: Any
) -> int:
    values_sizes = args[2]
    return 2 * math.prod(input_shape[:-1]) * math.prod(values_sizes)


def register_flop_formulas() -> None:
    """Idempotent: if the package is imported again, the first formulas stay."""
    ops = torch.ops.blockdiag
    formulas: dict[Any, Callable[..., int]] = {
        ops.linear: linear,
        ops.linear_input_grad: linear_input_grad,
        ops.linear_weight_grad: linear_weight_grad,
        ops.linear_weight_bias_grad: linear_weight_grad,  # sums are not counted, as in torch's own formulas
        ops.sparse_linear: sparse_linear,
        ops.sparse_linear_input_grad: sparse_linear_input_grad,
        ops.sparse_linear_values_grad: sparse_linear_values_grad,
    }
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)
