"""Layers that stand in for a dense one: products of smaller layers, and permuted diagonal blocks.

Each has the attribute ``weight`` (``PermutedBlockDiagLinear`` aside) of the dense layer that it stands in for, because
modules such as :class:`torch.nn.MultiheadAttention` read the weight of a layer rather than call it. It is multiplied
out on each access.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockdiag.functional import is_jagged, linear, of_jagged
from blockdiag.nn.block_diag_linear import BlockDiagLinear, check_own_forward


class _LowRank(nn.Module):
    """Two layers, ``down`` to few features and ``up`` from them, one after the other."""

    down: Any
    up: Any

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias

    def reset_parameters(self) -> None:
        """Draws the parameters of both layers anew, as they do by themselves."""
        self.down.reset_parameters()
        self.up.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))


class LowRankLinear(_LowRank):
    r"""A linear layer whose weight is a product of two: :math:`y = U (D x) + b`.

    Args:
        in_features: number of input features.
        out_features: number of output features.
        rank: number of features in between.
        bias: whether to learn an additive bias. Default: ``True``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: :math:`(*, \text{in\_features})`
        - Output: :math:`(*, \text{out\_features})`

    Attributes:
        down: the first layer, ``nn.Linear(in_features, rank, bias=False)``.
        up: the second layer, ``nn.Linear(rank, out_features, bias)``.

    Raises:
        ValueError: ``rank`` is not positive.
    """

    __constants__: ClassVar[list[str]] = ["in_features", "out_features", "rank"]

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, device: Any = None, dtype: Any = None
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


class LowRankConv(_LowRank):
    r"""A convolution as two: one with its kernel to ``rank`` channels, and a pointwise one to its output channels.

    Of grouped convolutions each group has its own ``rank`` channels. Splitting after the kernel is the decomposition of
    Zhang et al., Accelerating Very Deep Convolutional Networks for Classification and Detection, 2015.

    Args:
        conv: the :class:`torch.nn.Conv1d`, ``Conv2d`` or ``Conv3d``, or the LowRankConv, to take sizes and options
            from, with device, dtype, memory format, ``requires_grad`` and mode; not the values of its parameters.
        rank: number of channels in between, of each group.

    Shape:
        - Input and output: as ``conv``.

    Attributes:
        down: the first convolution, with ``conv``'s kernel size, stride, padding, dilation and groups, without bias.
        up: the second, of kernel size 1, with a bias if ``conv`` has one.

    Raises:
        ValueError: ``rank`` is not positive.
    """

    __constants__: ClassVar[list[str]] = ["rank"]

    def __init__(self, conv: Any, rank: int) -> None:
        if rank < 1:
            raise ValueError(f"LowRankConv: expected rank to be positive, but got {rank}")
        super().__init__()
        self.rank, self.groups = rank, conv.groups
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        spatial: Any  # the one that has the kernel
        spatial, last = (conv.down, conv.up) if isinstance(conv, LowRankConv) else (conv, conv)
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[spatial.weight.dim() - 2]
        latent, options = rank * conv.groups, {"device": spatial.weight.device, "dtype": spatial.weight.dtype}
        self.down = kind(
            conv.in_channels,
            latent,
            spatial.kernel_size,
            spatial.stride,
            spatial.padding,
            spatial.dilation,
            conv.groups,
            bias=False,
            padding_mode=spatial.padding_mode,
            **options,
        )
        self.up = kind(latent, conv.out_channels, 1, groups=conv.groups, bias=conv.bias is not None, **options)
        for part in (self.down, self.up):
            part.to(memory_format=_memory_format(spatial.weight))
        self.down.weight.requires_grad_(spatial.weight.requires_grad)
        self.up.weight.requires_grad_(last.weight.requires_grad)
        if last.bias is not None:
            self.up.bias.requires_grad_(last.bias.requires_grad)
        self.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """The weight of the one convolution, of shape ``(out_channels, in_channels / groups, *kernel_size)``."""
        down = self.down.weight.unflatten(0, (self.groups, self.rank)).flatten(2)
        up = self.up.weight.flatten(1).unflatten(0, (self.groups, -1))
        return (up @ down).flatten(0, 1).unflatten(1, self.down.weight.shape[1:])

    def extra_repr(self) -> str:
        return f"rank={self.rank}"


def _memory_format(weight: Tensor) -> torch.memory_format:
    """That of a convolution's weight, as torch reads it off the strides."""
    probe = torch.empty_like(weight, device="meta")  # with the strides, and nothing to copy
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = formats.get(weight.dim(), torch.contiguous_format)
    return channels_last if probe.to(memory_format=channels_last) is probe else torch.contiguous_format


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

    Raises:
        ValueError: ``rank`` is not positive, or the numbers of blocks do not divide the features.
    """

    __constants__: ClassVar[list[str]] = ["in_features", "num_blocks", "out_features", "rank"]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int | tuple[int, int],
        rank: int = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        in_blocks, out_blocks = (num_blocks, num_blocks) if isinstance(num_blocks, int) else num_blocks
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


class PermutedBlockDiagLinear(BlockDiagLinear):
    r"""A block-diagonal linear layer between two permutations of features: any assignment of features to blocks.

    Args:
        input_permutation: feature ``i`` of the blocks' input is feature ``input_permutation[i]`` of the layer's input,
            an int64 tensor of shape ``(in_features,)``, or a list; ``None`` for none. It is a buffer: a layer that was
            made on the meta device, where values get lost, gets it back from a ``state_dict``.
        output_permutation: feature ``i`` of the layer's output is feature ``output_permutation[i]`` of the blocks'
            output, shape ``(out_features,)``; ``None`` for none.
        The others are those of :class:`BlockDiagLinear`. Bias and weight are in the order of the blocks' features.

    Shape:
        - Input: :math:`(*, \text{in\_features})`
        - Output: :math:`(*, \text{out\_features})`

    Raises:
        ValueError: the sizes do not fit, as for :class:`BlockDiagLinear`, or a permutation is none.
    """

    input_permutation: Tensor | None
    output_permutation: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_blocks: int,
        input_permutation: Tensor | None = None,
        output_permutation: Tensor | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, num_blocks, bias=bias, device=device, dtype=dtype)
        permutations = {"input": (input_permutation, in_features), "output": (output_permutation, out_features)}
        for name, (permutation, features) in permutations.items():
            if permutation is not None:
                permutation = _checked_permutation(f"{name}_permutation", permutation, features, self.weight.device)
            self.register_buffer(f"{name}_permutation", permutation)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and is_jagged(input):
            return of_jagged(self.forward, input)
        output = linear(_permuted(input, self.input_permutation), self.weight, self.bias)
        return _permuted(output, self.output_permutation)

    def to_dense(self) -> nn.Linear:
        """One :class:`torch.nn.Linear` that computes the same."""
        dense = super().to_dense()
        with torch.no_grad():
            if self.input_permutation is not None:
                dense.weight.copy_(dense.weight[:, self.input_permutation.argsort()])
            if self.output_permutation is not None:
                dense.weight.copy_(dense.weight[self.output_permutation])
                if self.bias is not None:
                    dense.bias.copy_(dense.bias[self.output_permutation])
        return dense

    def to_linears(self) -> list[nn.Linear]:
        """Not available: separate layers have no permutations. Those of the blocks: ``unpermuted().to_linears()``."""
        raise NotImplementedError("PermutedBlockDiagLinear: use unpermuted().to_linears(), without the permutations")

    def unpermuted(self) -> BlockDiagLinear:
        """The layer of the blocks alone, with the same parameters, not copies."""
        check_own_forward(self)
        with torch.device("meta"):
            layer = BlockDiagLinear(self.in_features, self.out_features, self.num_blocks, self.bias is not None)
        layer.weight, layer.bias = self.weight, self.bias
        return layer.train(self.training)

    def extra_repr(self) -> str:
        permuted = [name for name in ("input", "output") if getattr(self, f"{name}_permutation") is not None]
        return f"{super().extra_repr()}, permuted={' and '.join(permuted) or None}"


def _checked_permutation(name: str, permutation: Any, features: int, device: torch.device) -> Tensor:
    """A copy on the device; of one on the meta device only the size is checked."""
    is_tensor = isinstance(permutation, Tensor)
    if not is_tensor or permutation.shape == (features,):
        if is_tensor and permutation.is_meta:
            if device.type == "meta":
                return permutation.to(torch.int64, copy=True)
            raise ValueError(
                f"PermutedBlockDiagLinear: expected {name} to have values, as the parameters on {device}, but it is on "
                "the meta device"
            )
        # Values, and not a tensor of them, which torch.device("meta") as a context would take to where there are none.
        values = permutation.tolist() if is_tensor else list(permutation)
        if sorted(values) == list(range(features)):
            return torch.tensor(values, dtype=torch.int64, device=device)
    raise ValueError(
        f"PermutedBlockDiagLinear: expected {name} to be a permutation of 0 to {features - 1}, but got {permutation}"
    )


def _is_refused(features: Any) -> bool:
    return isinstance(features, Tensor) and (
        features.layout != torch.strided or features.is_nested or features.is_quantized
    )


def _permuted(features: Tensor, permutation: Tensor | None) -> Tensor:
    """The last dimension in another order; not of what `linear` refuses, and says what to do with."""
    if permutation is None or (not torch.jit.is_scripting() and _is_refused(features)):
        return features
    # What torch.fx traces with is no Tensor, and has no sizes to compare.
    if not torch.jit.is_scripting() and isinstance(features, Tensor) and features.shape[-1:] != permutation.shape:
        raise ValueError(
            f"PermutedBlockDiagLinear: expected the last dimension to be {len(permutation)}, but got the shape "
            f"{tuple(features.shape)}"
        )
    # On a CPU index_select is much faster on matrices than on tensors of more dimensions.
    rows = features.unsqueeze(0).flatten(0, -2)
    return rows.index_select(-1, permutation).view(features.shape)


def near_square_blocks(features: int) -> int:
    """The largest divisor of `features` up to its square root: as many blocks as Monarch's, or fewer."""
    return max(d for d in range(1, math.isqrt(features) + 1) if features % d == 0)
