"""How many features there are to be between two factors."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from blockdiag.compression.select import Selected


class Target(NamedTuple):
    """What decides on the rank: one of these, or the policy's number."""

    latent_features: float | None
    latent_channels: float | None
    rank: int | None
    max_error: float | None
    operation_budget: float | None

    @classmethod
    def of(
        cls,
        latent_features: float | None,
        latent_channels: float | None,
        rank: int | None,
        max_error: float | None,
        operation_budget: float | None,
    ) -> "Target":
        """Checks the user's settings.

        Raises:
            ValueError: they contradict each other, or are out of range.
        """
        target = cls(latent_features, latent_channels, rank, max_error, operation_budget)
        fixed = latent_features is not None or latent_channels is not None or rank is not None
        if sum((fixed, max_error is not None, operation_budget is not None)) > 1:
            raise ValueError("expected one of a fixed rank, max_error and operation_budget, but got several")
        for name, value in zip(cls._fields[:3], target[:3], strict=True):
            if value is not None and (value <= 0 or (value >= 1 and value != int(value))):
                raise ValueError(f"expected {name} to be a positive integer or a fraction below 1, but got {value}")
        for name, value in zip(cls._fields[3:], target[3:], strict=True):
            if value is not None and not 0 < value < 1:
                raise ValueError(f"expected {name} to be between 0 and 1, but got {value}")
        return target


class Candidate(NamedTuple):
    """A layer to be factorised, with its multiplications for each row: as it is, and of each rank."""

    selected: Selected
    is_conv: bool
    smaller: int  # of its numbers of inputs and outputs, in each group
    largest: int  # rank that there is
    before: int
    each: int
    spectrum: Tensor  # share of the outputs' energy that each next rank adds; empty if not asked for

    @property
    def limit(self) -> int:
        """The largest rank that saves operations."""
        return min(self.largest, (self.before - 1) // self.each)


def choose_ranks(candidates: Sequence[Candidate], target: Target) -> dict[int, int]:
    """The rank of each layer, by the id of its selection; more than its limit where it had better stay dense."""
    budget = {}
    if target.operation_budget is not None and candidates:
        budget = _ranks_within(candidates, target.operation_budget)
    ranks = {}
    for candidate in candidates:
        selected = candidate.selected
        if selected.setting is not None:
            rank = selected.setting
            if rank < 1:
                raise ValueError(f"the policy gives '{selected.name}' the rank {rank}")
        elif id(selected) in budget:
            rank = budget[id(selected)]
        elif target.max_error is not None:
            left = candidate.spectrum.sum() - candidate.spectrum.cumsum(0)
            enough = (left.clamp(min=0).sqrt() <= target.max_error).nonzero()
            rank = int(enough[0]) + 1  # there always is one: nothing is left at the end
        elif target.rank is not None:
            rank = int(target.rank)
        else:
            latent = (target.latent_channels if candidate.is_conv else target.latent_features) or 0.25
            rank = int(latent) if latent >= 1 else max(1, int(latent * candidate.smaller))
        ranks[id(selected)] = rank
    return ranks


def _ranks_within(candidates: Sequence[Candidate], operation_budget: float) -> dict[int, int]:
    """Every next rank goes to where it adds the most energy for its operations, while the budget lasts.

    The shares of the energies fall with the rank, so that is all ranks above one threshold of energy for operations,
    which is found by bisection over them. A layer whose ranks would cost what it costs already stays as it is.
    """

    def ranks_at(threshold: float) -> list[int]:
        return [max(1, int((c.spectrum / c.each >= threshold).sum())) for c in candidates]

    def operations(ranks: Sequence[int]) -> int:
        return sum(min(rank * c.each, c.before) for rank, c in zip(ranks, candidates, strict=True))

    allowed = operation_budget * sum(c.before for c in candidates)
    if operations([1] * len(candidates)) > allowed:
        raise ValueError(f"an operation_budget of {operation_budget} is less than rank 1 of every layer needs")
    thresholds = torch.cat([c.spectrum / c.each for c in candidates]).unique()
    low, high = 0, len(thresholds)  # within the budget at `high`, where nothing is above the threshold
    while low < high:
        middle = (low + high) // 2
        if operations(ranks_at(float(thresholds[middle]))) <= allowed:
            high = middle
        else:
            low = middle + 1
    best = ranks_at(float(thresholds[high])) if high < len(thresholds) else [1] * len(candidates)
    if high > 0:  # of equals at the next threshold only some are within the budget
        for index, most in enumerate(ranks_at(float(thresholds[high - 1]))):
            while best[index] < most and operations([*best[:index], best[index] + 1, *best[index + 1 :]]) <= allowed:
                best[index] += 1
    return {id(c.selected): rank for c, rank in zip(candidates, best, strict=True)}
