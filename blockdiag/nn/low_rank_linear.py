"""A linear layer of low rank."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from blockdiag.nn._shared import LowRank


class LowRankLinear(LowRank):
    r"""A linear layer whose weight is a product of two smaller ones: :math:`y = U (D x) + b`.

    It has fewer parameters and FLOPs than the dense layer where :math:`\text{rank} < \text{in\_features} \cdot
    \text{out\_features} / (\text{in\_features} + \text{out\_features})`.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        rank: number of features between the two layers.
        bias: whether to learn an additive bias. Default: ``True``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: :math:`(*, \text{in\_features})`
        - Output: :math:`(*, \text{out\_features})`

    Attributes:
        down: the first layer, ``nn.Linear(in_features, rank, bias=False)``.
        up: the second layer, ``nn.Linear(rank, out_features, bias)``.
        weight: the dense weight of shape ``(out_features, in_features)``, multiplied out on each access. Modules such
            as :class:`torch.nn.MultiheadAttention` read a layer's weight rather than call the layer.
        bias: the bias of ``up``.

    Raises:
        ValueError: ``rank`` is not positive.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.LowRankLinear(in_features=256, out_features=128, rank=16)
        >>> layer(torch.randn(32, 256)).shape
        torch.Size([32, 128])
        >>> layer.down.weight.shape, layer.up.weight.shape
        (torch.Size([16, 256]), torch.Size([128, 16]))
    """

    __constants__: ClassVar[list[str]] = ["in_features", "out_features", "rank"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"LowRankLinear: expected rank to be positive, but got {rank}")
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The dense weight, of shape ``(out_features, in_features)``."""
        return self.up.weight @ self.down.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
