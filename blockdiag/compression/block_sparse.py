"""Linear layers become block-sparse ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockdiag._surgery.optimizers import Successor
from blockdiag._surgery.replacement import Replacement
from blockdiag.compression.checks import IN_ATTENTION, LINEARS
from blockdiag.compression.config import Build, Change, Config, Selected, as_whole, set_field, too_small
from blockdiag.compression.numerics.block_sparse import closest
from blockdiag.compression.numerics.moments import Moments
from blockdiag.compression.report import Step
from blockdiag.nn import BlockSparseLinear
from blockdiag.nn._sparse_blocks import (
    as_block_size,
    as_density,
    blocks_of,
    check_sizes,
    diagonals,
    has_diagonal,
)


@dataclass(frozen=True)
class BlockSparse(Config):
    """Linear layers become :class:`~blockdiag.BlockSparseLinear`: only some blocks of their weights are kept.

    Those are the blocks of the largest norm, or with ``calibration`` those that contribute most to the outputs on these
    inputs; blocks and bias are then fitted to the dense layer's outputs by least squares. Of a weight that was pruned
    in such blocks before, with as many left, just these are kept.

    :class:`torch.nn.MultiheadAttention` reads the weight of its output projection instead of calling the layer, which
    is left alone: apply :func:`~blockdiag.split_attention` first.

    Args:
        block_size: rows and columns of a block, in output and input features, or one number for both; they divide the
            layer's features.
        density: fraction of each layer's blocks that are kept, from 0 to 1. Default: ``budget``.
        diagonal: whether to keep the whole diagonal besides, in layers whose outputs are a multiple of their inputs. In
            others there is none.
        min_features: leaves layers with fewer input or output features alone.

    Raises:
        TypeError: ``block_size`` or ``min_features`` are no ints, ``density`` no number, or ``diagonal`` no bool.
        ValueError: ``block_size`` is not positive, ``density`` not from 0 to 1, or ``min_features`` negative.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 48))
        >>> config = blockdiag.BlockSparse((16, 4), density=0.25)
        >>> model, report = blockdiag.compress(model, config, calibration=[torch.randn(500, 64)], progress=False)
        >>> [layer.after for layer in report.layers]
        ['BlockSparseLinear[16x4 blocks, 25%] 64→32', 'BlockSparseLinear[16x4 blocks, 25%] 32→48']
    """

    block_size: int | Sequence[int] = (16, 1)
    density: float | None = None
    diagonal: bool = False
    min_features: int = 0

    takes = LINEARS
    makes = (BlockSparseLinear,)

    def __post_init__(self) -> None:
        set_field(self, "block_size", as_block_size("BlockSparse", self.block_size))
        if self.density is not None:
            set_field(self, "density", as_density("BlockSparse", self.density))
        if not isinstance(self.diagonal, bool):
            raise TypeError(f"BlockSparse: expected diagonal to be a bool, but got {self.diagonal!r}")
        set_field(self, "min_features", as_whole(self, "min_features", self.min_features, 0))

    def check_budget(self, budget: float | None) -> None:
        if (self.density is None) == (budget is None):
            got = "neither" if budget is None else "both"
            raise ValueError(f"BlockSparse: expected either density or budget, but got {got}")

    def check(self, selected: Selected, budget: float | None) -> str | None:
        reason = IN_ATTENTION if selected.in_attention else too_small(selected.layer, self.min_features)
        if reason is None:
            layer = selected.layer
            check_sizes(f"'{selected.name}'", layer.in_features, layer.out_features, self._size, diagonal=False)
        return reason

    @staticmethod
    def plan(chosen: Sequence[Selected], moments: Mapping[nn.Module, Moments], budget: float | None) -> Build:
        return lambda selected: selected.config._build(selected, moments, budget)

    @property
    def _size(self) -> tuple[int, int]:
        return as_block_size("BlockSparse", self.block_size)

    def _build(self, selected: Selected, moments: Mapping[nn.Module, Moments], budget: float | None) -> list[Change]:
        density = self.density if self.density is not None else budget
        assert density is not None  # by check_budget
        first, size = selected.layer, self._size
        known, centered = selected.merged(moments), selected.all_have_bias
        diagonal = self.diagonal and has_diagonal(first.in_features, first.out_features)
        fitted = closest(first.weight, size, density, diagonal, known, centered)
        steps = [Step(name, error) for name, error in fitted.errors.items()]
        changes: list[Change] = []
        made: dict[nn.Parameter, nn.Parameter] = {}  # by what they come from
        for layer, names in zip(selected.layers, selected.names, strict=True):
            old: Any = layer
            shift = None
            if known is not None and centered:
                shift = fitted.difference @ (known if selected.share_bias else moments[old]).mean[0]
            new: Any = BlockSparseLinear._like(old, size, fitted.kept, fitted.weight, fitted.diagonal, shift)
            if changes:  # one weight for all of them
                shared: Any = changes[0].replacement.new
                new.values, new.diagonal = shared.values, shared.diagonal
            successors = {old.weight: [Successor(new.values, lambda t: blocks_of(t, size)[fitted.kept])]}
            if diagonal:
                successors[old.weight].append(Successor(new.diagonal, lambda t: t[diagonals(t)]))
            if old.bias is not None:
                new.bias = made.setdefault(old.bias, new.bias)
                successors[old.bias] = [Successor(new.bias, torch.clone)]
            changes.append(Change(Replacement(names, old, new, successors), steps))
        return changes
