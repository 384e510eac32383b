"""A linear layer whose weight is a Monarch matrix."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockdiag.nn.block_diag_linear import BlockDiagLinear


class MonarchLinear(nn.Module):
    r"""A linear layer whose weight is a product of two block-diagonal ones with a fixed permutation between them.

    The input is split into :math:`k` slices, the output into :math:`l`. The first layer maps every input slice to
    :math:`r` values for every output slice; the permutation, a transposition, brings together what belongs to an output
    slice; the second layer maps it there. The dense weight, cut into :math:`l \times k` submatrices, has rank at most
    :math:`r` in each, and every such matrix is of this form. After Dao et al., Monarch: Expressive Structured Matrices
    for Efficient and Accurate Training, 2022, there with :math:`r = 1` and the output permuted once more.

    Args:
        in_features: number of input features, a multiple of :math:`k`.
        out_features: number of output features, a multiple of :math:`l`.
        num_blocks: :math:`(k, l)`, the blocks of the first layer and of the second; one number for both.
        rank: :math:`r`, rank of the submatrices. Default: 1.
        bias: whether to learn an additive bias. Default: ``True``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: :math:`(*, \text{in\_features})`
        - Output: :math:`(*, \text{out\_features})`

    Attributes:
        first: ``BlockDiagLinear(in_features, k * l * rank, k, bias=False)``.
        second: ``BlockDiagLinear(k * l * rank, out_features, l, bias)``.
        weight: the dense weight of shape ``(out_features, in_features)``, multiplied out on each access. Modules such
            as :class:`torch.nn.MultiheadAttention` read a layer's weight rather than call the layer.
        bias: the bias of ``second``.

    Raises:
        ValueError: ``rank`` is not positive, or the numbers of blocks do not divide the features.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.MonarchLinear(in_features=256, out_features=1024, num_blocks=(16, 32))
        >>> layer(torch.randn(32, 256)).shape
        torch.Size([32, 1024])
        >>> sum(parameter.numel() for parameter in layer.parameters())  # of a dense layer: 263168
        25600
    """

    __constants__: ClassVar[list[str]] = ["in_features", "num_blocks", "out_features", "rank"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int | tuple[int, int],
        rank: int = 1,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        both = tuple(num_blocks) if isinstance(num_blocks, Iterable) else (num_blocks, num_blocks)
        if len(both) != 2:
            raise ValueError(f"MonarchLinear: expected num_blocks to be one number or two, but got {num_blocks}")
        in_blocks, out_blocks = both
        if rank < 1:
            raise ValueError(f"MonarchLinear: expected rank to be positive, but got {rank}")
        for name, features, blocks in (
            ("in_features", in_features, in_blocks),
            ("out_features", out_features, out_blocks),
        ):
            if blocks < 1 or features % blocks != 0:
                raise ValueError(
                    f"MonarchLinear: expected {name} to be a multiple of its number of blocks {blocks}, "
                    f"but got {features}"
                )
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.num_blocks, self.rank = (in_blocks, out_blocks), rank
        latent = in_blocks * out_blocks * rank
        self.first = BlockDiagLinear(in_features, latent, in_blocks, bias=False, device=device, dtype=dtype)
        self.second = BlockDiagLinear(latent, out_features, out_blocks, bias=bias, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, of shape ``(out_features, in_features)``."""
        in_blocks, out_blocks = self.num_blocks
        first = self.first.weight.unflatten(1, (out_blocks, self.rank))  # (k, l, r, in_block)
        second = self.second.weight.unflatten(2, (in_blocks, self.rank))  # (l, out_block, k, r)
        return torch.einsum("lokr,klri->loki", second, first).flatten(2).flatten(0, 1)

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``second``."""
        return self.second.bias

    def reset_parameters(self) -> None:
        """Draws the parameters of both layers anew."""
        self.first.reset_parameters()
        self.second.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        in_blocks, out_blocks = self.num_blocks
        hidden = self.first(input).unflatten(-1, (in_blocks, out_blocks, self.rank))
        return self.second(hidden.transpose(-3, -2).flatten(-3))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_blocks={self.num_blocks}, "
            f"rank={self.rank}"
        )
