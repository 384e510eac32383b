"""The blocks of a dense matrix that are worth keeping, and what to keep there."""

from typing import NamedTuple

import torch
from torch import Tensor

from blockdiag.compression.numerics.moments import Moments, exact
from blockdiag.compression.numerics.projection import relative_error
from blockdiag.nn._sparse_blocks import blocks_of, diagonals


class Fitted(NamedTuple):
    """A block-sparse matrix in double precision.

    Attributes:
        kept: which blocks, bool, of shape (rows of blocks, columns of blocks).
        weight: the dense matrix of the kept blocks, zero elsewhere.
        diagonal: what is added to its diagonal; None if there is none.
        difference: what the dense matrix has more.
        errors: after each step, relative to the outputs of the matrix (see projection.py).
    """

    kept: Tensor
    weight: Tensor
    diagonal: Tensor | None
    difference: Tensor
    errors: dict[str, float]


def closest(
    weight: Tensor,
    block_size: tuple[int, int],
    density: float,
    diagonal: bool,
    moments: Moments | None,
    centered: bool,
) -> Fitted:
    """Keeps ``round(density * blocks)`` blocks: those with the most energy, or with `moments` the most in the outputs.

    With `moments` what is kept is then fitted to the outputs by least squares; `centered` if a bias takes care of the
    mean. To find the best of all blocks is NP-hard.
    """
    weight = exact(weight)
    plain = None if moments is None else moments.second(centered=False)[0]
    second = None if moments is None else moments.second(centered)[0]
    own = diagonals(weight) if diagonal else None
    if plain is not None and second is not None:
        # A ridge towards the weight: directions that inputs do not have stay as they are, and decide where inputs do
        # not. The second part is above what centering rounds off.
        ridge = 1e-6 * second.diagonal().real.mean().clamp(min=0) + 1e-10 * plain.diagonal().real.mean()
        second = second + (ridge if ridge > 0 else 1.0) * torch.eye(
            len(second), dtype=second.dtype, device=second.device
        )
    blocks = blocks_of(weight if own is None else weight.masked_fill(own, 0), block_size)
    kept = _largest(_energies(blocks, second), round(density * blocks.shape[0] * blocks.shape[1]))
    mask = kept[:, None, :, None].expand(-1, block_size[0], -1, block_size[1]).reshape(weight.shape)
    mask = mask if own is None else mask | own
    result = weight * mask
    errors = {"largest blocks": relative_error(weight, weight - result, plain, plain)}
    if moments is not None and second is not None:
        result = _refitted(weight, mask, second, 1 if diagonal else block_size[0])
        errors["refitted"] = relative_error(weight, weight - result, moments.second(centered)[0], plain)
    difference = weight - result
    if own is None:
        return Fitted(kept, result, None, difference, errors)
    return Fitted(kept, result.masked_fill(own, 0), result[own], difference, errors)


def _energies(blocks: Tensor, second: Tensor | None) -> Tensor:
    """E|block x|^2 of each block by itself, (rows of blocks, columns of blocks)."""
    if second is None:
        return blocks.abs().square().sum((2, 3))
    in_block = blocks.shape[3]
    own = second.unflatten(0, (-1, in_block)).unflatten(2, (-1, in_block)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return ((blocks @ own) * blocks.conj()).sum((2, 3)).real


def _largest(energies: Tensor, count: int) -> Tensor:
    """Where the `count` largest elements are, the first ones where some are equal."""
    order = energies.flatten().argsort(descending=True, stable=True)
    kept = torch.zeros(energies.numel(), dtype=torch.bool, device=energies.device)
    kept[order[:count]] = True
    return kept.view(energies.shape)


def _refitted(weight: Tensor, mask: Tensor, second: Tensor, rows_alike: int) -> Tensor:
    """The matrix on `mask`, equal in each `rows_alike` rows, whose outputs are closest to those of `weight`."""
    result = torch.zeros_like(weight)
    for first in range(0, len(weight), rows_alike):
        rows = slice(first, first + rows_alike)
        (columns,) = mask[first].nonzero(as_tuple=True)
        factor = torch.linalg.cholesky(second[columns][:, columns])
        result[rows, columns] = torch.cholesky_solve((weight[rows] @ second[:, columns]).mH, factor).mH
    return result
