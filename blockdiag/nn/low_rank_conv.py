"""A convolution of low rank."""

import operator
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockdiag.nn._shared import LowRank

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LowRankConv(LowRank):
    r"""A convolution as two: one with its kernel to ``rank`` channels, and a pointwise one to its output channels.

    In a grouped convolution each group has its own ``rank`` channels. To split after the kernel is the decomposition of
    Zhang et al., Accelerating Very Deep Convolutional Networks for Classification and Detection, 2015.

    Args:
        in_channels: number of input channels.
        out_channels: number of output channels.
        kernel_size: size of the kernel. A tuple of 1, 2 or 3 sizes makes the layer a :class:`torch.nn.Conv1d`,
            ``Conv2d`` or ``Conv3d``; a number stands for two equal sizes.
        rank: number of channels between the two convolutions, of each group.
        stride: stride of the kernel, one number or one for each dimension. Default: 1.
        padding: padding of the input, one number or one for each dimension, or ``"same"`` or ``"valid"``. Default: 0.
        dilation: spacing of the kernel's elements, one number or one for each dimension. Default: 1.
        groups: number of groups of channels, which divides ``in_channels`` and ``out_channels``. Default: 1.
        bias: whether to learn an additive bias. Default: ``True``.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``. Default: ``"zeros"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: :math:`(*, \text{in\_channels}, L)`, :math:`(*, \text{in\_channels}, H, W)` or :math:`(*,
          \text{in\_channels}, D, H, W)`, where :math:`*` is the batch, or nothing.
        - Output: that of the convolution with these options.

    Attributes:
        down: the first convolution, with kernel size, stride, padding, dilation and groups, and without bias.
        up: the second convolution, of kernel size 1, with the bias.
        weight: the weight of the one convolution, of shape ``(out_channels, in_channels / groups, *kernel_size)``,
            multiplied out on each access.
        bias: the bias of ``up``.

    Raises:
        ValueError: a size is not positive, the channels are no multiples of ``groups``, or an option does not have one
            value for each dimension.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.LowRankConv(64, 128, kernel_size=3, rank=16, padding=1)
        >>> layer(torch.randn(8, 64, 28, 28)).shape
        torch.Size([8, 128, 28, 28])
        >>> audio = blockdiag.LowRankConv(64, 128, kernel_size=(5,), rank=16, stride=2)  # a tuple of one: Conv1d
        >>> audio(torch.randn(8, 64, 101)).shape
        torch.Size([8, 128, 49])
    """

    __constants__: ClassVar[list[str]] = ["rank"]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        rank: int,
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rank = operator.index(rank)
        sizes = tuple(kernel_size) if isinstance(kernel_size, Iterable) else (kernel_size, kernel_size)
        if len(sizes) not in _CONVOLUTIONS:
            raise ValueError(f"LowRankConv: expected kernel_size to have 1, 2 or 3 dimensions, but got {kernel_size}")
        options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
        for name, value in options.items():
            if isinstance(value, Iterable) and not isinstance(value, str) and len(tuple(value)) != len(sizes):
                raise ValueError(
                    f"LowRankConv: expected {name} to be one number, or {len(sizes)} as kernel_size, but got {value}"
                )
        for name, value in {**options, "kernel_size": sizes, "rank": rank, "groups": groups}.items():
            if name != "padding" and min(value if isinstance(value, Iterable) else [value]) < 1:
                raise ValueError(f"LowRankConv: expected {name} to be positive, but got {value}")
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels < 0 or channels % groups != 0:
                raise ValueError(
                    f"LowRankConv: expected {name} to be a multiple of groups = {groups}, but got {channels}"
                )
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.rank, self.groups = rank, groups
        kind: Any = _CONVOLUTIONS[len(sizes)]
        shared: dict[str, Any] = {"groups": groups, "device": device, "dtype": dtype}
        self.down = kind(in_channels, rank * groups, sizes, bias=False, padding_mode=padding_mode, **options, **shared)
        self.up = kind(rank * groups, out_channels, 1, bias=bias, **shared)

    @classmethod
    def from_conv(cls, conv: Any, rank: int) -> "LowRankConv":
        """A layer of another convolution's sizes and options, with parameters of its own.

        It is of the same dtype, memory format, ``requires_grad`` and mode, on the same device. The values of its
        parameters are drawn anew: :func:`blockdiag.compress` projects weights.

        Args:
            conv: a :class:`torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d``, or a ``LowRankConv``.
            rank: number of channels between the two convolutions, of each group.

        Raises:
            TypeError: ``conv`` is another module.
            ValueError: ``rank`` is not positive.

        Example::

            >>> import torch, blockdiag
            >>> conv = torch.nn.Conv2d(64, 128, 3, padding=1).to(memory_format=torch.channels_last)
            >>> layer = blockdiag.LowRankConv.from_conv(conv, rank=16)
            >>> layer(torch.randn(8, 64, 28, 28)).shape
            torch.Size([8, 128, 28, 28])
        """
        if not isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d | LowRankConv):
            raise TypeError(f"LowRankConv.from_conv: expected a convolution, but got {type(conv).__name__}")
        spatial: Any  # the convolution that has the kernel
        spatial, last = (conv.down, conv.up) if isinstance(conv, LowRankConv) else (conv, conv)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            spatial.kernel_size,
            rank,
            spatial.stride,
            spatial.padding,
            spatial.dilation,
            conv.groups,
            bias=conv.bias is not None,
            padding_mode=spatial.padding_mode,
            device=spatial.weight.device,
            dtype=spatial.weight.dtype,
        )
        for part in (layer.down, layer.up):
            part.to(memory_format=_memory_format(spatial.weight))
        layer.down.weight.requires_grad_(spatial.weight.requires_grad)
        layer.up.weight.requires_grad_(last.weight.requires_grad)
        if last.bias is not None:
            layer.up.bias.requires_grad_(last.bias.requires_grad)
        return layer.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The weight of the one convolution, of shape ``(out_channels, in_channels / groups, *kernel_size)``."""
        down = self.down.weight.unflatten(0, (self.groups, self.rank)).flatten(2)
        up = self.up.weight.flatten(1).unflatten(0, (self.groups, -1))
        return (up @ down).flatten(0, 1).unflatten(1, self.down.weight.shape[1:])

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def _memory_format(weight: Tensor) -> torch.memory_format:
    """The memory format of a convolution's weight, as torch reads it off the strides."""
    probe = torch.empty_like(weight, device="meta")  # with the strides, and nothing to copy
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = formats.get(weight.dim(), torch.contiguous_format)
    return channels_last if probe.to(memory_format=channels_last) is probe else torch.contiguous_format
