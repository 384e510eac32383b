"""The block-diagonal linear layer as a module."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from blockdiag._surgery.plain import carry_attributes, why_not_plain
from blockdiag.functional import linear
from blockdiag.nn._shared import Unquantized, check_own_forward


class BlockDiagLinear(Unquantized):
    r"""A linear layer whose weight is block diagonal: ``num_blocks`` independent layers side by side.

    The input's features are split into ``num_blocks`` equal slices, slice ``g`` goes through block ``g``, and the
    results are joined: :math:`y_g = x_g W_g^T + b_g`.

    Args:
        in_features: number of input features of all blocks together, a multiple of ``num_blocks``.
        out_features: number of output features of all blocks together, a multiple of ``num_blocks``.
        num_blocks: number of blocks.
        bias: whether to learn an additive bias. Default: ``True``.
        device: device of the parameters.
        dtype: dtype of the parameters: a floating-point or complex type that :func:`blockdiag.linear` takes.

    Shape:
        - Input: :math:`(*, \text{in\_features})`, or :math:`(*, \text{num\_blocks}, \text{in\_features} /
          \text{num\_blocks})`.
        - Output: :math:`(*, \text{out\_features})` or :math:`(*, \text{num\_blocks}, \text{out\_features} /
          \text{num\_blocks})`, as the input.

    Attributes:
        weight: the learnable weights, of shape ``(num_blocks, out_features // num_blocks, in_features // num_blocks)``.
            Each block is initialized as the weight of its own :class:`torch.nn.Linear`, from
            :math:`\mathcal{U}(-\sqrt{k}, \sqrt{k})`, where :math:`k = \text{num\_blocks} / \text{in\_features}`.
        bias: the learnable bias, of shape ``(out_features,)``, initialized from the same distribution; ``None`` if
            ``bias`` is ``False``.

    Raises:
        ValueError: ``num_blocks`` is not positive, or does not divide ``in_features`` and ``out_features``.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.BlockDiagLinear(in_features=256, out_features=128, num_blocks=4)
        >>> layer(torch.randn(32, 256)).shape
        torch.Size([32, 128])
        >>> layer(torch.randn(32, 4, 64)).shape  # stacked: a slice for each block
        torch.Size([32, 4, 32])

    See :func:`blockdiag.linear` for the function, and :class:`PermutedBlockDiagLinear` for blocks of any features.
    """

    _quantize_as = "to_dense() or to_linears()"
    __constants__: ClassVar[list[str]] = ["in_features", "num_blocks", "out_features"]
    in_features: int
    out_features: int
    num_blocks: int
    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_blocks < 1:
            raise ValueError(f"BlockDiagLinear: expected num_blocks to be positive, but got {num_blocks}")
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            if features < 0 or features % num_blocks != 0:
                raise ValueError(
                    f"BlockDiagLinear: expected {name} to be a multiple of num_blocks = {num_blocks}, "
                    f"but got {features}"
                )
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.num_blocks = num_blocks
        shape = (num_blocks, out_features // num_blocks, in_features // num_blocks)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, each block from the distribution of its own :class:`torch.nn.Linear`."""
        in_block = self.in_features // self.num_blocks
        bound = 1 / math.sqrt(in_block) if in_block > 0 else 0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_blocks={self.num_blocks}, "
            f"bias={self.bias is not None}"
        )

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear]) -> "BlockDiagLinear":
        """The layer whose block ``g`` computes what ``linears[g]`` computes, with copies of their parameters.

        Raises:
            ValueError: there are none, they differ in size, dtype, device, bias or ``requires_grad``, or one computes
                something else than :class:`torch.nn.Linear`, or has hooks.

        Example::

            >>> import torch, blockdiag
            >>> linears = [torch.nn.Linear(64, 32) for _ in range(4)]
            >>> blockdiag.BlockDiagLinear.from_linears(linears)
            BlockDiagLinear(in_features=256, out_features=128, num_blocks=4, bias=True)
        """
        if not linears:
            raise ValueError("BlockDiagLinear.from_linears: expected at least one nn.Linear, but got none")
        for index, given in enumerate(linears):
            _check_plain(f"BlockDiagLinear.from_linears: layer {index}", given)
        kinds = [_kind(linear) for linear in linears]
        for index, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ValueError(
                    f"BlockDiagLinear.from_linears: expected every layer to be like the first, {kinds[0]}, but layer "
                    f"{index} is {kind}"
                )
        first, count = linears[0], len(linears)
        layer = cls._empty_like(first, first.in_features * count, first.out_features * count, count)
        with torch.no_grad():
            for block, linear in enumerate(linears):
                layer.weight[block].copy_(linear.weight)
                if layer.bias is not None:
                    layer.bias.view(count, -1)[block].copy_(linear.bias)
        return layer

    def to_linears(self) -> list[nn.Linear]:
        """``num_blocks`` :class:`torch.nn.Linear` with copies of the blocks: the inverse of :meth:`from_linears`.

        Raises:
            ValueError: the layer has hooks or a replaced forward.

        Example::

            >>> import blockdiag
            >>> blockdiag.BlockDiagLinear(4, 6, num_blocks=2).to_linears()
            [Linear(in_features=2, out_features=3, bias=True), Linear(in_features=2, out_features=3, bias=True)]
        """
        return [self._dense(weight, bias) for weight, bias in zip(self.weight, self._block_biases(), strict=True)]

    @classmethod
    def from_dense(cls, linear: nn.Linear, num_blocks: int) -> "BlockDiagLinear":
        """The layer with the diagonal blocks of ``linear``'s weight, and its bias; what is off the diagonal is dropped.

        Raises:
            ValueError: ``num_blocks`` is not positive, or does not divide the features of ``linear``; or that computes
                something else than :class:`torch.nn.Linear`, or has hooks.

        Example::

            >>> import torch, blockdiag
            >>> dense = torch.nn.Linear(4, 6)
            >>> layer = blockdiag.BlockDiagLinear.from_dense(dense, num_blocks=2)
            >>> torch.equal(layer.weight[1], dense.weight[3:, 2:])
            True
        """
        _check_plain("BlockDiagLinear.from_dense: linear", linear)
        layer = cls._empty_like(linear, linear.in_features, linear.out_features, num_blocks)
        _, out_block, in_block = layer.weight.shape
        with torch.no_grad():
            for g, block in enumerate(layer.weight):
                block.copy_(linear.weight[g * out_block : (g + 1) * out_block, g * in_block : (g + 1) * in_block])
            if layer.bias is not None:
                layer.bias.copy_(linear.bias)
        return layer

    def to_dense(self) -> nn.Linear:
        """One :class:`torch.nn.Linear` that computes the same, its weight full of zeros off the diagonal blocks.

        Raises:
            ValueError: the layer has hooks or a replaced forward.

        Example::

            >>> import torch, blockdiag
            >>> layer = blockdiag.BlockDiagLinear(4, 6, num_blocks=2)
            >>> torch.equal(layer.to_dense().weight, torch.block_diag(*layer.weight))
            True
        """
        return self._dense(torch.block_diag(*self.weight), self.bias)

    @classmethod
    def _empty_like(cls, linear: nn.Linear, in_features: int, out_features: int, num_blocks: int) -> "BlockDiagLinear":
        """A layer of these sizes with the bias, device, dtype, mode and ``requires_grad`` of ``linear``."""
        layer = nn.utils.skip_init(
            cls,
            in_features,
            out_features,
            num_blocks,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.weight.requires_grad_(linear.weight.requires_grad)
        carry_attributes(linear.weight, layer.weight)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
            carry_attributes(linear.bias, layer.bias)
        return layer.train(linear.training)

    def _block_biases(self) -> Sequence[Tensor | None]:
        return [None] * self.num_blocks if self.bias is None else list(self.bias.view(self.num_blocks, -1))

    def _dense(self, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        """An ``nn.Linear`` with copies of these parameters, in this layer's mode."""
        check_own_forward(self)
        dense = nn.utils.skip_init(
            nn.Linear,
            weight.shape[1],
            weight.shape[0],
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(weight)
            dense.weight.requires_grad_(self.weight.requires_grad)
            carry_attributes(self.weight, dense.weight)
            if self.bias is not None:
                dense.bias.copy_(bias)
                dense.bias.requires_grad_(self.bias.requires_grad)
                carry_attributes(self.bias, dense.bias)
        return dense.train(self.training)


def _check_plain(what: str, linear: nn.Linear) -> None:
    reason = why_not_plain(linear, nn.Linear)
    if reason is not None:
        raise ValueError(f"{what} {reason}")


def _kind(linear: nn.Linear) -> str:
    """All that the blocks of one layer must share, in words."""
    weight = linear.weight
    requires_grad = [parameter.requires_grad for parameter in linear.parameters(recurse=False)]
    return f"{linear} of {weight.dtype} on {weight.device} with requires_grad {requires_grad}"
