"""The layout in which the ops read activations, as their C++ check determines it."""

from collections.abc import Sequence

import torch

from blockdiag._load import extension


def feature_dims(input_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """1 if an input of the op is concatenated, ``(*, G * K)``, and 2 if it is stacked, ``(*, G, K)``."""
    if torch.compiler.is_dynamo_compiling():  # it cannot trace the check, only the same in Python
        num_blocks, _, in_block = weight_shape
        last = input_shape[-1]
        return 2 if len(input_shape) >= 2 and last != num_blocks * in_block and last == in_block else 1
    return 2 if extension.is_stacked(len(input_shape), input_shape[-1], list(weight_shape)) else 1
