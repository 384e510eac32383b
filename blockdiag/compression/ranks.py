"""The ranks of all factorized layers: fixed, within an error, or within a budget of operations."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Candidate(NamedTuple):
    """A layer to factorize, with its multiplications for each row: as it is, and for each rank."""

    rank: int | None  # that its config fixes
    max_error: float | None
    largest: int  # possible rank
    before: int
    each: int
    spectrum: Tensor  # share of the outputs' energy that each next rank adds; empty if its rank is fixed

    @property
    def limit(self) -> int:
        """The largest rank that saves operations."""
        return max(0, min(self.largest, (self.before - 1) // self.each))


def choose_ranks(candidates: Sequence[Candidate], budget: float | None) -> list[int]:
    """The rank of each layer; more than its limit where it is better left alone."""
    if budget is not None:
        return _ranks_within(candidates, budget)
    return [c.rank if c.rank is not None else _rank_of_error(c) for c in candidates]


def _rank_of_error(candidate: Candidate) -> int:
    left = candidate.spectrum.sum() - candidate.spectrum.cumsum(0)
    assert candidate.max_error is not None
    too_few = left.clamp(min=0).sqrt() > candidate.max_error  # not the last: nothing is left at the end
    return int(too_few.sum()) + 1


def _ranks_within(candidates: Sequence[Candidate], budget: float) -> list[int]:
    """Every next rank goes to where it adds the most energy for its operations, while the budget lasts.

    The shares of the energies fall with the rank, so that is all ranks above one threshold of energy for operations,
    which is found by bisection over them. A layer whose ranks would cost as much as it costs already stays as it is.
    """

    def ranks_at(threshold: float) -> list[int]:
        return [max(1, int((c.spectrum / c.each >= threshold).sum())) for c in candidates]

    def operations(ranks: Sequence[int]) -> int:
        return sum(min(rank * c.each, c.before) for rank, c in zip(ranks, candidates, strict=True))

    allowed = budget * sum(c.before for c in candidates)
    if operations([1] * len(candidates)) > allowed:
        raise ValueError(f"a budget of {budget} is less than rank 1 of every layer needs")
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
    return best
