"""What configs share that make products of two layers: the choice of ranks, projection, and building."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockdiag._surgery.duplicate import duplicate
from blockdiag._surgery.optimizers import Successor
from blockdiag._surgery.replacement import Replacement, fill
from blockdiag.compression.checks import IN_ATTENTION
from blockdiag.compression.config import Build, Change, Config, Selected, as_number, as_whole, set_field, too_small
from blockdiag.compression.numerics import projection
from blockdiag.compression.numerics.moments import Moments, exact
from blockdiag.compression.ranks import Candidate, choose_ranks
from blockdiag.compression.report import Step


class Factorized(Config):
    """Layers become products of two smaller ones, whose rank is fixed, found from an error, or from the budget.

    All layers of such configs share one budget of operations.
    """

    rank: float | None
    max_error: float | None
    min_features: int

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.rank is not None:
            rank = as_number(f"{kind}'s rank", self.rank)
            if not (0 < rank < 1 or (rank >= 1 and rank % 1 == 0)):
                raise ValueError(
                    f"{kind}: expected rank to be a positive integer or a fraction below 1, but got {self.rank}"
                )
            set_field(self, "rank", rank if rank < 1 else int(rank))
        if self.max_error is not None:
            set_field(self, "max_error", as_number(f"{kind}'s max_error", self.max_error))
            if not 0 < self.max_error < 1:
                raise ValueError(f"{kind}: expected max_error to be between 0 and 1, but got {self.max_error}")
        if self.rank is not None and self.max_error is not None:
            raise ValueError(f"{kind}: expected either rank or max_error, but got both")
        set_field(self, "min_features", as_whole(self, "min_features", self.min_features, 0))

    def check_budget(self, budget: float | None) -> None:
        kind = type(self).__name__
        if budget is not None and (self.rank is not None or self.max_error is not None):
            raise ValueError(f"{kind}: expected one of rank, max_error and budget, but got several")
        if budget == 1:
            raise ValueError(f"{kind}: expected budget to be below 1, but got {budget}")

    def check(self, selected: Selected, budget: float | None) -> str | None:
        if selected.in_attention and budget is not None:
            return IN_ATTENTION
        if not isinstance(selected.layer, Config.compressed_kinds()):
            reason = too_small(selected.layer, self.min_features)
            if reason is not None:
                return reason
        blocks = self.num_blocks_of(selected)
        return blocks if isinstance(blocks, str) else None

    @staticmethod
    def plan(chosen: Sequence[Selected], moments: Mapping[nn.Module, Moments], budget: float | None) -> Build:
        candidates = [_candidate(selected, moments, budget) for selected in chosen]
        ranks = choose_ranks(candidates, budget)
        sizes = {id(s): (rank, c.limit) for s, rank, c in zip(chosen, ranks, candidates, strict=True)}

        def build(selected: Selected) -> list[Change] | str:
            config, matrices = selected.config, _matrices(selected, moments)
            rank, limit = sizes[id(selected)]
            found = None
            if config.max_error is not None:
                found = _smallest_rank(config, selected.layer, matrices, config.max_error, rank, limit)
                if found is None:
                    return f"no rank that saves operations (up to {limit}) has an error of at most {config.max_error}"
            elif rank <= limit:
                found = rank, *_project(config, selected.layer, matrices, rank)
            if found is None:
                return f"rank {rank} would not save operations (up to {limit} would)"
            rank, layer, error = found
            return _changes(selected, layer, matrices, moments, Step(f"rank {rank}", error))

        return build

    @abstractmethod
    def num_blocks_of(self, selected: Selected) -> tuple[int, int] | str:
        """The blocks of the two factors; or the reason to leave the layers alone.

        Raises:
            ValueError: they do not divide the layer's sizes.
        """

    @abstractmethod
    def rank_of(self, layer: Any, largest: int) -> int:
        """The rank that the config fixes, or by default, of a layer with a `largest` possible one."""

    @abstractmethod
    def empty(self, old: Any, num_blocks: tuple[int, int], rank: int) -> Any:
        """A product with uninitialized parameters, of the old layer's sizes, device, dtype and memory format.

        With a bias if the old layer has one. Draws no random numbers.
        """

    def as_rank(self, rank: float, smaller: int) -> int:
        """A rank, or that fraction of the smaller number of inputs and outputs."""
        return int(rank) if rank >= 1 else max(1, int(rank * smaller))


class _Matrices(NamedTuple):
    """A layer as the matrices that it multiplies rows of inputs with, one for each group."""

    weight: Tensor  # (groups, N, K), in double
    second: Tensor | None  # (groups, K, K)
    uncentered: Tensor | None  # the same where second is a covariance
    mean: Tensor | None  # (groups, K)
    num_blocks: tuple[int, int]  # of its factors


def _matrices(selected: Selected, moments: Mapping[nn.Module, Moments]) -> _Matrices:
    layer, known = selected.layer, selected.merged(moments)
    return _Matrices(
        _weight(layer).unflatten(0, (getattr(layer, "groups", 1), -1)),
        known.second(selected.all_have_bias) if known else None,
        known.second(centered=False) if known else None,
        known.mean if known else None,
        selected.config.num_blocks_of(selected),
    )


def _candidate(selected: Selected, moments: Mapping[nn.Module, Moments], budget: float | None) -> Candidate:
    config, matrices = selected.config, _matrices(selected, moments)
    groups, rows, columns = matrices.weight.shape
    in_blocks, out_blocks = matrices.num_blocks
    largest = min(rows // out_blocks, columns // in_blocks)
    fixed = config.max_error is None and budget is None
    return Candidate(
        rank=config.rank_of(selected.layer, largest) if fixed else None,
        max_error=config.max_error,
        largest=largest,
        before=sum(part.weight.numel() for part in _parts(selected.layer)),
        each=groups * (out_blocks * columns + in_blocks * rows),
        spectrum=torch.empty(0) if fixed else _spectrum(matrices),
    )


def _smallest_rank(
    config: Factorized, layer: Any, matrices: _Matrices, max_error: float, likely: int, limit: int
) -> tuple[int, Any, float] | None:
    """The smallest rank up to the limit whose error, as measured on the layer, is within the bound, and its layer.

    What the spectrum tells is exact but for rounding, and the likely rank is the answer, or next to it. Of several
    submatrices whose inputs are known it is an estimate, and the rank is found by bisection.
    """

    def within(error: float) -> bool:
        return error <= max_error * (1 + 1e-6)

    if matrices.second is None or matrices.num_blocks[0] == 1:
        for rank in range(likely, limit + 1):
            new, error = _project(config, layer, matrices, rank)
            if within(error):
                return rank, new, error
        return None
    best, low, high = None, 1, limit
    while low <= high:
        rank = (low + high) // 2
        new, error = _project(config, layer, matrices, rank)
        if within(error):
            best, high = (rank, new, error), rank - 1
        else:
            low = rank + 1
    return best


def _spectrum(matrices: _Matrices) -> Tensor:
    """Energy that each next rank takes away from the error, relative to that of the outputs, all groups together."""
    seconds = [None] * len(matrices.weight) if matrices.second is None else list(matrices.second)
    energies = sum(
        projection.spectrum(weight, matrices.num_blocks, second)
        for weight, second in zip(matrices.weight, seconds, strict=True)
    )
    assert isinstance(energies, Tensor)
    return energies / projection.energy(matrices.weight, matrices.uncentered).clamp(
        min=torch.finfo(energies.dtype).tiny
    )


def _project(config: Factorized, layer: Any, matrices: _Matrices, rank: int) -> tuple[Any, float]:
    """A layer like the given one, but for the bias, with the closest factors of this rank, and its error."""
    seconds = [None] * len(matrices.weight) if matrices.second is None else list(matrices.second)
    factors = [
        projection.monarch(weight, matrices.num_blocks, rank, second)
        for weight, second in zip(matrices.weight, seconds, strict=True)
    ]
    new = config.empty(layer, matrices.num_blocks, rank)
    for part, values in zip(_parts(new), zip(*factors, strict=True), strict=True):
        fill(part.weight, torch.stack(values).reshape(part.weight.shape))
    difference = matrices.weight - _weight(new).view_as(matrices.weight)
    return new, projection.relative_error(matrices.weight, difference, matrices.second, matrices.uncentered)


def _parts(layer: Any) -> tuple[Any, ...]:
    """The layers that have the weights: the two factors, or a dense layer itself."""
    return tuple(layer.children()) if isinstance(layer, Config.compressed_kinds()) else (layer,)


def _weight(layer: Any) -> Tensor:
    """The layer's weight, of factors multiplied out in double, flattened to a matrix."""
    dtype = torch.promote_types(next(layer.parameters()).dtype, torch.float64)
    precise = duplicate(layer, hooks=False).to(dtype) if len(_parts(layer)) > 1 else layer
    return exact(precise.weight).flatten(1)


def _changes(
    selected: Selected, new: Any, matrices: _Matrices, moments: Mapping[nn.Module, Moments], step: Step
) -> list[Change]:
    """The new layer for each of those that share a weight, and the biases that make up for the mean of the error."""
    config = selected.config
    difference = matrices.weight - _weight(new).view_as(matrices.weight)
    biases: dict[nn.Parameter, nn.Parameter] = {}
    changes: list[Change] = []
    for layer, names in zip(selected.layers, selected.names, strict=True):
        old: Any = layer
        replacing = new if not changes else config.empty(old, matrices.num_blocks, new.rank)
        parts, olds = _parts(replacing), _parts(old)
        successors: dict[nn.Parameter, list[Successor]] = {}
        # Both factors succeed a dense weight; of old factors each is succeeded by its own.
        for part, filled, before in zip(parts, _parts(new), olds * (len(parts) // len(olds)), strict=True):
            part.weight = filled.weight.requires_grad_(before.weight.requires_grad)
            successors.setdefault(before.weight, []).append(Successor(part.weight))
        if old.bias is not None:
            last = parts[-1]
            if old.bias in biases:
                last.bias = biases[old.bias]
            else:
                mean = None
                if matrices.mean is not None:
                    mean = matrices.mean if selected.share_bias else moments[layer].mean
                shift = 0 if mean is None else (difference @ mean.unsqueeze(-1)).flatten()
                fill(last.bias, exact(old.bias) + shift)
                last.bias.requires_grad_(old.bias.requires_grad)
                biases[old.bias] = last.bias
            successors[old.bias] = [Successor(last.bias, lambda t: t)]
        changes.append(Change(Replacement(names, old, replacing.train(old.training), successors), [step]))
    return changes
