"""Group lasso over the blocks of weights: training that drives whole blocks to zero."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from blockdiag.compression.config import as_number
from blockdiag.nn._sparse_blocks import as_block_size, blocks_of, check_sizes


class GroupLasso:
    r"""The group lasso of Yuan and Lin (2006) over the blocks of dense weights, by its proximal step.

    The penalty :math:`\lambda \sqrt{n k} \sum_b \lVert W_b \rVert` drives whole blocks :math:`W_b` of :math:`n \times
    k` weights to zero. Its gradient does so only in the limit. The proximal step, after each step of an optimizer with
    the learning rate :math:`\eta`, shrinks every block by a factor, :math:`\max(0, 1 - \eta \lambda \sqrt{n k} / \lVert
    W_b \rVert)`, and makes those zero that are small. ``compress(model, BlockSparse(block_size, density))`` then keeps
    the others: :attr:`density` says how many there are.

    Args:
        weights: the weights, each of shape ``(out_features, in_features)``, such as those of :class:`torch.nn.Linear`.
        block_size: rows and columns of a block, or one number for both, as of :class:`~blockdiag.BlockSparse`.
        strength: :math:`\lambda`, not negative. 1e-3 is much beside a loss of about 1.

    Attributes:
        density: the fraction of all blocks that are not zero.

    Raises:
        TypeError: ``weights`` are no tensors, ``block_size`` is not one or two integers, or ``strength`` no number.
        ValueError: there is no weight, one is no matrix, or blocks do not divide it; or ``strength`` is negative.

    Example::

        >>> import torch, blockdiag
        >>> from blockdiag.compression import GroupLasso
        >>> layer = torch.nn.Linear(64, 32)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> lasso = GroupLasso([layer.weight], block_size=(16, 4), strength=1.0)
        >>> x, y = torch.randn(100, 64), torch.zeros(100, 32)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(layer(x), y).backward()
        ...     optimizer.step()
        ...     lasso.step(optimizer.param_groups[0]["lr"])
        >>> lasso.density  # nothing is worth its penalty
        0.0
    """

    def __init__(self, weights: Iterable[Tensor], block_size: int | Sequence[int], strength: float) -> None:
        self.block_size = as_block_size("GroupLasso", block_size)
        if isinstance(weights, Tensor):
            raise TypeError("GroupLasso: expected an iterable of weights, but got a tensor: put it in a list")
        self.weights = list(weights)
        if not self.weights:
            raise ValueError("GroupLasso: expected at least one weight, but got none")
        for weight in self.weights:
            if not isinstance(weight, Tensor):
                raise TypeError(f"GroupLasso: expected weights to be tensors, but got {type(weight).__name__}")
            if weight.dim() != 2:
                raise ValueError(f"GroupLasso: expected weights to be matrices, but got shape {tuple(weight.shape)}")
            check_sizes("GroupLasso", weight.shape[1], weight.shape[0], self.block_size, diagonal=False)
        self.strength = _as_nonnegative("strength", strength)

    def _norms(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))  # a half type is too coarse
        return torch.linalg.vector_norm(blocks_of(wide, self.block_size), dim=(2, 3))

    def penalty(self) -> Tensor:
        """The penalty's value, differentiable: to log it, or to add it to a loss in place of :meth:`step`."""
        scale = self.strength * math.sqrt(math.prod(self.block_size))
        return scale * torch.stack([self._norms(weight).sum() for weight in self.weights]).sum()

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor) -> None:
        """The proximal step: shrinks the weights in place. Call it after each step of the optimizer.

        Args:
            learning_rate: that of the optimizer's step.

        Raises:
            ValueError: it is negative.
        """
        threshold = _as_nonnegative("learning_rate", learning_rate) * self.strength
        threshold *= math.sqrt(math.prod(self.block_size))
        for weight in self.weights:
            norms = self._norms(weight)
            # A block of zeros stays as it is, and is not divided by its norm.
            factors = (1 - threshold / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
            blocks_of(weight, self.block_size).mul_(factors[:, :, None, None])

    @property
    def density(self) -> float:
        kept = sum(int((self._norms(weight.detach()) > 0).sum()) for weight in self.weights)
        blocks = sum(weight.numel() for weight in self.weights) // math.prod(self.block_size)
        return kept / blocks if blocks > 0 else 0.0


def _as_nonnegative(name: str, value: Any) -> float:
    number = as_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"GroupLasso: expected {name} to be finite and not negative, but got {value}")
    return number
