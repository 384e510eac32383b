"""The first two moments of a layer's inputs."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of all rows ``x`` of a layer's inputs, by group of a convolution (a linear layer is one group), in double."""

    num_rows: int
    total: Tensor  # sum of x, (groups, K)
    outer: Tensor  # sum of x x^H, (groups, K, K)

    @property
    def mean(self) -> Tensor:
        return self.total / self.num_rows

    def second(self, centered: bool) -> Tensor:
        """E[x x^H], or with `centered` the covariance: what is left to minimize where a bias takes care of the mean."""
        second = self.outer / self.num_rows
        return second - self.mean.unsqueeze(-1) * self.mean.conj().unsqueeze(-2) if centered else second


def moments_of(rows: Tensor) -> Moments:
    """The moments of rows (groups, rows, K)."""
    rows = exact(rows)
    return Moments(rows.shape[1], rows.sum(1), rows.mT @ rows.conj())


def add_moments(moments: Sequence[Moments]) -> Moments:
    """The moments of all their rows together."""
    num_rows, totals, outers = zip(*moments, strict=True)
    return Moments(sum(num_rows), sum(totals), sum(outers))


def exact(tensor: Tensor) -> Tensor:
    """In double precision: projections are made once, and their errors should be the method's."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))
