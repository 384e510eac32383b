"""The block-sparse linear layer as a module."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from blockdiag._surgery.plain import carry_attributes, why_not_plain
from blockdiag.functional import sparse_linear
from blockdiag.nn._shared import Unquantized, check_own_forward
from blockdiag.nn._sparse_blocks import as_block_size, as_density, blocks_of, check_features, check_sizes, diagonals


class BlockSparseLinear(Unquantized):
    r"""A linear layer of whose weight only some blocks are kept: :math:`y = x W^T + b`, without the other blocks.

    Args:
        in_features: number of input features, a multiple of the block's columns.
        out_features: number of output features, a multiple of the block's rows.
        block_size: rows and columns of a block, in output and input features, or one number for both. On a CPU any
            block of 16 or more rows runs at full speed; of ``(16, 1)``, ``(16, 4)`` and ``(16, 16)`` the first loses
            least of a trained weight, and the last needs least memory for indices.
        density: fraction of the blocks that are kept, from 0 to 1: ``round(density * blocks)`` of them, at random
            positions, equally many in each row of blocks where that divides.
        bias: whether to learn an additive bias. Default: ``True``.
        diagonal: whether to keep the weight's whole diagonal besides, or that of each of the square matrices that it
            stacks, for layers whose ``out_features`` are a multiple of ``in_features``.
        device: device of the parameters and indices.
        dtype: dtype of the parameters.

    Shape:
        - Input: :math:`(*, \text{in\_features})`
        - Output: :math:`(*, \text{out\_features})`

    Attributes:
        values: the learnable blocks, of shape ``(blocks, *block_size)``, row by row of blocks, initialized from
            :math:`\mathcal{U}(-\sqrt{k}, \sqrt{k})`, where :math:`1 / k` is the mean number of inputs of an output.
        crow_indices: an int32 buffer of shape ``(out_features // block_size[0] + 1,)``: where the blocks of each row
            begin. State dicts hold it, and a layer that was made on the meta device gets it back from one.
        col_indices: an int32 buffer of shape ``(blocks,)``: the column of each block.
        bias: the learnable bias, of shape ``(out_features,)``, initialized as the values; ``None`` if ``bias`` is
            ``False``.
        diagonal: the learnable diagonal, of shape ``(out_features,)``, initialized as the values; it is added to the
            blocks. ``None`` if ``diagonal`` is ``False``.
        weight: the dense weight, of shape ``(out_features, in_features)``, made on each access.

    Raises:
        TypeError: ``block_size`` is not one or two integers, or ``density`` not a number.
        ValueError: blocks are not positive, or do not divide the features; ``density`` is not from 0 to 1; or
            ``diagonal``, where ``out_features`` are no multiple of ``in_features``. In a call: the input has another
            number of features.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.BlockSparseLinear(in_features=64, out_features=32, block_size=(16, 4), density=0.25)
        >>> layer(torch.randn(10, 64)).shape
        torch.Size([10, 32])
        >>> layer
        BlockSparseLinear(in_features=64, out_features=32, block_size=(16, 4), density=0.25, bias=True, diagonal=False)

    See :func:`blockdiag.sparse_linear` for the function, and :class:`blockdiag.BlockSparse` to convert a model.
    """

    __constants__: ClassVar[list[str]] = ["block_size", "in_features", "out_features"]
    __jit_unused_properties__: ClassVar[list[str]] = ["density", "weight"]
    in_features: int
    out_features: int
    block_size: tuple[int, int]
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    diagonal: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        block_size: int | Sequence[int] = (16, 1),
        density: float = 0.1,
        bias: bool = True,
        diagonal: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        block_size = as_block_size("BlockSparseLinear", block_size)
        density = as_density("BlockSparseLinear", density)
        check_sizes("BlockSparseLinear", in_features, out_features, block_size, diagonal)
        super().__init__()
        rows, cols = out_features // block_size[0], in_features // block_size[1]
        blocks = round(density * rows * cols)
        self._make(in_features, out_features, block_size, blocks, bias, diagonal, device, dtype)
        if not self.values.is_meta:
            with torch.device("cpu"):
                each, more = divmod(blocks, max(rows, 1))  # some rows have one more than others
                counts = each + (torch.randperm(rows) < more).long()
                self._set_positions(torch.rand(rows, cols).argsort(1).argsort(1) < counts.unsqueeze(1))
            self.reset_parameters()

    def _make(
        self,
        in_features: int,
        out_features: int,
        block_size: tuple[int, int],
        blocks: int,
        bias: bool,
        diagonal: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        """Parameters and buffers without values."""
        self.in_features, self.out_features, self.block_size = in_features, out_features, block_size
        self.values = nn.Parameter(torch.empty((blocks, *block_size), device=device, dtype=dtype))
        for name, wanted in (("bias", bias), ("diagonal", diagonal)):
            vector = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, vector)
        for name, size in (("crow_indices", out_features // block_size[0] + 1), ("col_indices", blocks)):
            self.register_buffer(name, torch.zeros(size, device=device, dtype=torch.int32))

    def _set_positions(self, kept: Tensor) -> None:
        """Keeps the blocks where `kept`, of shape (rows of blocks, columns of blocks), is true."""
        self.crow_indices[1:] = kept.sum(1).cumsum(0)
        # As nonzero(), but the size of the result does not depend on values: fake tensors have none.
        order = kept.flatten().to(torch.uint8).argsort(descending=True, stable=True)
        self.col_indices.copy_(order[: len(self.col_indices)] % max(kept.shape[1], 1))

    def reset_parameters(self) -> None:
        """Draws the parameters anew; the positions of the blocks stay."""
        rows = self.out_features // self.block_size[0]
        inputs = len(self.values) * self.block_size[1] / rows if rows > 0 else 0.0
        inputs += self.diagonal is not None
        bound = 1 / math.sqrt(inputs) if inputs > 0 else 0
        for parameter in self.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def density(self) -> float:
        """The fraction of the blocks that are kept, the diagonal aside."""
        whole = self.out_features * self.in_features
        return self.values.numel() / whole if whole > 0 else 0.0

    @property
    def weight(self) -> Tensor:
        """The dense weight, of shape ``(out_features, in_features)``."""
        rows, cols = self.out_features // self.block_size[0], self.in_features // self.block_size[1]
        blocks = self.values.new_zeros((rows, cols, *self.block_size))
        counts = self.crow_indices.diff().long()
        row_indices = torch.arange(rows, device=counts.device).repeat_interleave(counts, output_size=len(self.values))
        blocks = blocks.index_put((row_indices, self.col_indices.long()), self.values)
        weight = blocks.transpose(1, 2).reshape(self.out_features, self.in_features)
        return weight if self.diagonal is None else weight + diagonals(weight) * self.diagonal.unsqueeze(1)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            check_features(input, self.in_features)
        return sparse_linear(input, self.values, self.crow_indices, self.col_indices, self.bias, self.diagonal)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, block_size={self.block_size}, "
            f"density={self.density:.3g}, bias={self.bias is not None}, diagonal={self.diagonal is not None}"
        )

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        block_size: int | Sequence[int] = (16, 1),
        density: float = 0.1,
        diagonal: bool = False,
        inputs: Tensor | None = None,
    ) -> "BlockSparseLinear":
        """The layer with those blocks of ``linear``'s weight that matter most, and its bias.

        Args:
            linear: the dense layer, which stays as it is.
            block_size: as for the class.
            density: ``round(density * blocks)`` blocks are kept: those of the largest norm, or with ``inputs`` of the
                largest outputs.
            diagonal: whether to keep the diagonal besides. It does not count as a part of the blocks.
            inputs: some of the layer's inputs, ``(*, in_features)``; several times as many rows as features are
                advisable. What is kept, and the bias, is then fitted to the dense layer's outputs by least squares.

        Raises:
            TypeError: as for the class.
            ValueError: as for the class; ``inputs`` are of another size, or values are not finite; or ``linear``
                computes something else than :class:`torch.nn.Linear`, or has hooks.

        Example::

            >>> import torch, blockdiag
            >>> dense = torch.nn.Linear(64, 32)
            >>> layer = blockdiag.BlockSparseLinear.from_dense(dense, (16, 4), density=0.25)
            >>> layer.values.shape, layer.density
            (torch.Size([8, 16, 4]), 0.25)
            >>> x = torch.randn(1000, 64) * torch.linspace(0, 2, 64)
            >>> fitted = blockdiag.BlockSparseLinear.from_dense(dense, (16, 4), density=0.25, inputs=x)
            >>> bool((fitted(x) - dense(x)).norm() < (layer(x) - dense(x)).norm())
            True
        """
        # Not at the top: the compression package imports the layers.
        from blockdiag.compression.numerics.block_sparse import closest
        from blockdiag.compression.numerics.moments import moments_of

        what = "BlockSparseLinear.from_dense"
        if not isinstance(linear, nn.Module):
            raise TypeError(f"{what}: expected linear to be an nn.Linear, but got {type(linear).__name__}")
        reason = why_not_plain(linear, nn.Linear)
        if reason is not None:
            raise ValueError(f"{what}: linear {reason}")
        block_size, density = as_block_size(what, block_size), as_density(what, density)
        check_sizes(what, linear.in_features, linear.out_features, block_size, diagonal)
        if linear.weight.is_meta:
            raise ValueError(f"{what}: expected the weight to have values, but it is on the meta device")
        if inputs is not None and not isinstance(inputs, Tensor):
            raise TypeError(f"{what}: expected inputs to be a tensor, but got {type(inputs).__name__}")
        if inputs is not None and (inputs.dtype.is_complex != linear.weight.is_complex() or inputs.numel() == 0):
            kind = "complex" if linear.weight.is_complex() else "real"
            raise ValueError(
                f"{what}: expected inputs to be {kind}, as the weight, and at least one row, but got shape "
                f"{tuple(inputs.shape)} of {inputs.dtype}"
            )
        if inputs is not None and inputs.shape[-1:] != (linear.in_features,):
            raise ValueError(
                f"{what}: expected the last dimension of inputs to be in_features = {linear.in_features}, but got "
                f"shape {tuple(inputs.shape)}"
            )
        for name, tensor in (("the weight", linear.weight), ("inputs", inputs)):
            if tensor is not None and not tensor.isfinite().all():
                raise ValueError(f"{what}: expected {name} to be finite")
        moments = None if inputs is None else moments_of(inputs.reshape(1, -1, linear.in_features))
        fitted = closest(linear.weight, block_size, density, diagonal, moments, linear.bias is not None)
        shift = None if moments is None or linear.bias is None else fitted.difference @ moments.mean[0]
        return cls._like(linear, block_size, fitted.kept, fitted.weight, fitted.diagonal, shift)

    @classmethod
    def _like(
        cls,
        linear: nn.Linear,
        block_size: tuple[int, int],
        kept: Tensor,
        weight: Tensor,
        diagonal: Tensor | None,
        shift: Tensor | None,
    ) -> "BlockSparseLinear":
        """A layer with these values, and the bias plus `shift`, device, dtype, mode and gradients of ``linear``."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        old = linear.weight
        layer._make(
            linear.in_features,
            linear.out_features,
            block_size,
            int(kept.sum()),
            linear.bias is not None,
            diagonal is not None,
            old.device,
            old.dtype,
        )
        layer._set_positions(kept)
        with torch.no_grad():
            layer.values.copy_(blocks_of(weight, block_size)[kept])
            layer.values.requires_grad_(old.requires_grad)
            carry_attributes(old, layer.values)
            if layer.diagonal is not None:
                layer.diagonal.copy_(cast(Tensor, diagonal))
                layer.diagonal.requires_grad_(old.requires_grad)
                carry_attributes(old, layer.diagonal)
            if layer.bias is not None:
                layer.bias.copy_(linear.bias if shift is None else linear.bias + shift)
                layer.bias.requires_grad_(linear.bias.requires_grad)
                carry_attributes(linear.bias, layer.bias)
        return layer.train(linear.training)

    def to_dense(self) -> nn.Linear:
        """One :class:`torch.nn.Linear` that computes the same, its weight full of zeros where there are no blocks.

        Raises:
            ValueError: the layer has hooks or a replaced forward.

        Example::

            >>> import torch, blockdiag
            >>> layer = blockdiag.BlockSparseLinear(64, 64, (16, 4), density=0.2, diagonal=True)
            >>> x = torch.randn(5, 64)
            >>> torch.testing.assert_close(layer.to_dense()(x), layer(x))
        """
        check_own_forward(self)
        weight = self.weight.detach()
        dense = nn.utils.skip_init(
            nn.Linear,
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for name, value in (("weight", weight), ("bias", self.bias)):
                if value is not None:
                    old: Any = self.values if name == "weight" else value
                    new: Any = getattr(dense, name)
                    new.copy_(value)
                    new.requires_grad_(old.requires_grad)
                    carry_attributes(old, new)
        return dense.train(self.training)

    @classmethod
    def from_bsr(
        cls, weight: Tensor, bias: Tensor | None = None, diagonal: Tensor | None = None
    ) -> "BlockSparseLinear":
        """The layer with the blocks of a matrix of :obj:`torch.sparse_bsr` layout, copied as the other arguments.

        Args:
            weight: of shape ``(out_features, in_features)``; its columns ascend in each row of blocks, as those of
                :meth:`torch.Tensor.to_sparse_bsr` do.
            bias: of shape ``(out_features,)``, or ``None``.
            diagonal: of shape ``(out_features,)``, or ``None``.

        Raises:
            TypeError: ``weight`` is of another layout, or ``bias`` or ``diagonal`` no tensor.
            ValueError: it has no two dimensions, or ``bias`` or ``diagonal`` another shape or dtype.
            RuntimeError: its indices are out of order; on a CPU.

        Example::

            >>> import torch, blockdiag
            >>> dense = torch.block_diag(torch.ones(4, 2), torch.ones(4, 2))
            >>> layer = blockdiag.BlockSparseLinear.from_bsr(dense.to_sparse_bsr((4, 2)))
            >>> torch.equal(layer.weight, dense), layer.density
            (True, 0.5)
        """
        if not isinstance(weight, Tensor) or weight.layout != torch.sparse_bsr:
            got = weight.layout if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"BlockSparseLinear.from_bsr: expected a tensor of torch.sparse_bsr layout, but got {got}")
        if weight.dim() != 2 or weight.values().dim() != 3:
            raise ValueError(
                f"BlockSparseLinear.from_bsr: expected a matrix of matrices, but got shape {tuple(weight.shape)} with "
                f"values of shape {tuple(weight.values().shape)}"
            )
        out_features, in_features = weight.shape
        values = weight.values()
        block_size = (values.shape[1], values.shape[2])
        check_sizes("BlockSparseLinear.from_bsr", in_features, out_features, block_size, diagonal is not None)
        for name, vector in (("bias", bias), ("diagonal", diagonal)):
            if vector is not None and not isinstance(vector, Tensor):
                got = type(vector).__name__
                raise TypeError(f"BlockSparseLinear.from_bsr: expected {name} to be a tensor, but got {got}")
            if vector is not None and (vector.shape != (out_features,) or vector.dtype != values.dtype):
                raise ValueError(
                    f"BlockSparseLinear.from_bsr: expected {name} to have shape ({out_features},) and the dtype "
                    f"{values.dtype}, but got {tuple(vector.shape)} and {vector.dtype}"
                )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._make(
            in_features,
            out_features,
            block_size,
            len(values),
            bias is not None,
            diagonal is not None,
            values.device,
            values.dtype,
        )
        layer.crow_indices.copy_(weight.crow_indices())
        layer.col_indices.copy_(weight.col_indices())
        with torch.no_grad():
            for parameter, value in ((layer.values, values), (layer.bias, bias), (layer.diagonal, diagonal)):
                if parameter is not None and value is not None:
                    parameter.copy_(value)
            layer(layer.values.new_zeros(0, in_features))  # checks the indices
        return layer

    def to_bsr(self) -> Tensor:
        """The blocks, without the diagonal, as a matrix of :obj:`torch.sparse_bsr` layout, with copies of all.

        Example::

            >>> import torch, blockdiag
            >>> layer = blockdiag.BlockSparseLinear(64, 32, (16, 4), density=0.25)
            >>> torch.equal(layer.to_bsr().to_dense(), layer.weight)
            True
        """
        indices = [index.long() for index in (self.crow_indices, self.col_indices)]
        values = self.values.detach().clone()
        size = (self.out_features, self.in_features)
        return torch.sparse_bsr_tensor(indices[0], indices[1], values, size=size, check_invariants=False)
