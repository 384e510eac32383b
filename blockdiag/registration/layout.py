"""The layout in which the ops read activations, as their C++ check determines it."""

from collections.abc import Sequence

from blockdiag._load import extension


def feature_dims(input_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """1 if an input of the op is concatenated, ``(*, G * K)``, and 2 if it is stacked, ``(*, G, K)``."""
    return 2 if extension.is_stacked(len(input_shape), input_shape[-1], list(weight_shape)) else 1
