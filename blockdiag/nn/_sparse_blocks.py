"""Blocks of a weight: their sizes, how many there are, and where."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def as_block_size(what: str, block_size: Any) -> tuple[int, int]:
    """Rows and columns of a block.

    Raises:
        TypeError: it is not one or two integers.
        ValueError: they are not positive.
    """
    both = block_size if isinstance(block_size, Sequence) and not isinstance(block_size, str) else (block_size,) * 2
    try:
        if len(both) != 2 or any(isinstance(size, bool) for size in both):
            raise TypeError
        rows, cols = (operator.index(size) for size in both)
    except TypeError:
        raise TypeError(f"{what}: expected block_size to be one or two ints, but got {block_size!r}") from None
    if min(rows, cols) < 1:
        raise ValueError(f"{what}: expected block_size to be positive, but got {block_size!r}")
    return rows, cols


def as_density(what: str, density: Any) -> float:
    """The fraction of blocks that are kept.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not from 0 to 1.
    """
    try:
        if isinstance(density, bool | str):
            raise TypeError
        number = float(density)
    except (TypeError, ValueError):
        raise TypeError(f"{what}: expected density to be a number, but got {density!r}") from None
    if not 0 <= number <= 1:
        raise ValueError(f"{what}: expected density to be from 0 to 1, but got {density}")
    return number


def check_sizes(what: str, in_features: int, out_features: int, block_size: tuple[int, int], diagonal: bool) -> None:
    """Raises if blocks do not divide a weight, or it has no diagonal."""
    for name, features, size in (
        ("out_features", out_features, block_size[0]),
        ("in_features", in_features, block_size[1]),
    ):
        if not isinstance(features, int):
            raise TypeError(f"{what}: expected {name} to be an int, but got {features!r}")
        if features < 0 or features % size != 0:
            raise ValueError(f"{what}: expected {name} to be a multiple of the block's {size}, but got {features}")
    if diagonal and not has_diagonal(in_features, out_features):
        raise ValueError(
            f"{what}: expected out_features to be a multiple of in_features = {in_features} for a diagonal, but got "
            f"{out_features}"
        )


def has_diagonal(in_features: int, out_features: int) -> bool:
    """Whether a weight is square, or stacks square matrices."""
    return out_features % max(in_features, 1) == 0 and (in_features > 0 or out_features == 0)


def diagonals(weight: Tensor) -> Tensor:
    """Where the diagonal of each of the square matrices is that a weight stacks."""
    out_features, in_features = weight.shape
    own = torch.eye(in_features, dtype=torch.bool, device=weight.device)
    return own.repeat(out_features // max(in_features, 1), 1)


def blocks_of(weight: Tensor, block_size: tuple[int, int]) -> Tensor:
    """The blocks of a matrix, of shape (rows of blocks, columns of blocks, *block_size); a view if it can be one."""
    return weight.unflatten(0, (-1, block_size[0])).unflatten(2, (-1, block_size[1])).transpose(1, 2)


def check_features(input: Any, in_features: int) -> None:
    """Raises ValueError for another number of features: the op reads it off the input."""
    # A proxy of torch.fx is no Tensor, and strided nested tensors have no shape.
    known = isinstance(input, Tensor) and (not input.is_nested or input.layout == torch.jagged)
    if known and input.shape[-1:] != (in_features,):
        raise ValueError(
            f"BlockSparseLinear: expected input's last dimension to be in_features = {in_features}, but got shape "
            f"{tuple(input.shape)}"
        )
