"""Recurrent layers with block-sparse weights."""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from blockdiag._surgery.plain import why_not_plain
from blockdiag.nn.block_sparse_linear import BlockSparseLinear


class _BlockSparseRNN(nn.Module):
    """What both recurrent layers share: layers, directions, batches and states."""

    _dense: ClassVar[str]  # the class in torch.nn
    _gates: ClassVar[int]
    _parts: ClassVar[int]  # of a state
    __constants__: ClassVar[list[str]] = ["batch_first", "bidirectional", "hidden_size", "input_size", "num_layers"]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        block_size: int | Sequence[int] = (16, 1),
        density: float = 0.1,
        diagonal: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        getattr(nn, self._dense)(*sizes, device="meta")  # raises for what it does not take
        super().__init__()
        self._set_sizes(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        options: Any = {"block_size": block_size, "density": density, "bias": bias, "device": device, "dtype": dtype}
        gates = self._gates * hidden_size
        for layer in range(num_layers):
            inputs = input_size if layer == 0 else hidden_size * self._directions
            for _ in range(self._directions):
                self.input_layers.append(BlockSparseLinear(inputs, gates, **options))
                self.recurrent_layers.append(BlockSparseLinear(hidden_size, gates, diagonal=diagonal, **options))

    def _set_sizes(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
    ) -> None:
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        self.input_layers, self.recurrent_layers = nn.ModuleList(), nn.ModuleList()

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    @classmethod
    def _from_dense(
        cls, dense: nn.RNNBase, block_size: int | Sequence[int], density: float, diagonal: bool
    ) -> "_BlockSparseRNN":
        if not isinstance(dense, nn.Module):
            raise TypeError(f"{cls.__name__}.from_dense: expected an nn.{cls._dense}, but got {type(dense).__name__}")
        reason = why_not_plain(dense, getattr(nn, cls._dense))
        if reason is None and dense.proj_size > 0:
            reason = f"has projections (proj_size={dense.proj_size})"
        if reason is not None:
            raise ValueError(f"{cls.__name__}.from_dense: the layer {reason}")
        sparse = cls.__new__(cls)
        nn.Module.__init__(sparse)
        sparse._set_sizes(
            dense.input_size,
            dense.hidden_size,
            dense.num_layers,
            dense.bias,
            dense.batch_first,
            dense.dropout,
            dense.bidirectional,
        )
        for index in range(dense.num_layers * sparse._directions):
            for which, layers in (("ih", sparse.input_layers), ("hh", sparse.recurrent_layers)):
                weight, bias = _parameters(dense, which, index, sparse._directions)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
                linear.weight = weight
                if bias is not None:
                    linear.bias = bias
                kept = diagonal and which == "hh"
                layers.append(BlockSparseLinear.from_dense(linear, block_size, density, diagonal=kept))
        return sparse.train(dense.training)

    def to_dense(self) -> Any:
        """The layer of :mod:`torch.nn` that computes the same, with copies of the parameters.

        Raises:
            ValueError: a layer inside has hooks or a replaced forward.
        """
        weight = self.recurrent_layers[0].values
        dense: Any = getattr(nn, self._dense)(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            bidirectional=self.bidirectional,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for which, layers in (("ih", self.input_layers), ("hh", self.recurrent_layers)):
                for index, layer in enumerate(layers):
                    linear = cast(BlockSparseLinear, layer).to_dense()
                    for to, value in zip(
                        _parameters(dense, which, index, self._directions), (linear.weight, linear.bias), strict=True
                    ):
                        if to is not None:
                            to.copy_(value)
                            to.requires_grad_(value.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}"
        return f"{text}, batch_first={self.batch_first}, dropout={self.dropout}, bidirectional={self.bidirectional}"

    def _layer(self, gates: Tensor, states: tuple[Tensor, ...], weight: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        """One layer in one direction, from its inputs' share in the gates: all outputs, and the last state."""
        raise NotImplementedError

    def _run(self, input: Tensor, states: list[list[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """All layers on (time, batch, features), and their last states. `states`: its parts, for each layer."""
        last: list[list[Tensor]] = []
        outputs: list[Tensor] = []
        directions = self._directions
        of_layers = zip(self.input_layers, self.recurrent_layers, zip(*states, strict=True), strict=True)
        for index, (of_input, of_hidden, initial) in enumerate(of_layers):
            gates = of_input(input)  # at once for the whole sequence
            backward = index % directions == 1
            weight = (
                of_hidden.values,
                of_hidden.crow_indices,
                of_hidden.col_indices,
                of_hidden.bias,
                of_hidden.diagonal,
            )
            output, state = self._layer(gates.flip(0) if backward else gates, initial, weight)
            outputs.append(output.flip(0) if backward else output)
            last.append(state)
            if len(outputs) == directions:  # the layer is complete
                input = output if directions == 1 else torch.cat(outputs, -1)
                outputs.clear()
                if self.dropout > 0 and index + 1 < len(self.input_layers):
                    input = nn.functional.dropout(input, self.dropout, self.training)
        return input, last

    def _forward(self, input: Tensor, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """As the layers of torch.nn; `states` are the parts of a state, each (layers * directions, batch, hidden)."""
        name = type(self).__name__
        plain = isinstance(input, Tensor) and not input.is_nested
        if not plain or input.dim() not in (2, 3) or input.shape[-1] != self.input_size:
            got = tuple(input.shape) if plain else f"a {type(input).__name__}"
            raise ValueError(f"{name}: expected input of shape (time, [batch,] {self.input_size}), but got {got}")
        batched = input.dim() == 3
        steps = input.transpose(0, 1) if batched and self.batch_first else input
        if len(steps) == 0:
            raise ValueError(f"{name}: expected input to have at least one step, but got shape {tuple(input.shape)}")
        batch = steps.shape[1:-1]
        count = self.num_layers * self._directions
        shape = (count, *batch, self.hidden_size)
        if states is None:
            states = [input.new_zeros(shape)] * self._parts
        if len(states) != self._parts or any(not isinstance(state, Tensor) or state.shape != shape for state in states):
            shapes = [tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__ for state in states]
            raise ValueError(f"{name}: expected a state of {self._parts} x the shape {shape}, but got {shapes}")
        output, last = self._run(steps, [list(state.unbind(0)) for state in states])
        ends = [torch.stack(part) for part in zip(*last, strict=True)]
        return output.transpose(0, 1) if batched and self.batch_first else output, ends


class BlockSparseGRU(_BlockSparseRNN):
    r"""A :class:`torch.nn.GRU` with block-sparse weights, for inference step by step and for training.

    Args:
        input_size: as for :class:`torch.nn.GRU`, as the next six.
        hidden_size: number of features of the state; a multiple of both sides of a block.
        num_layers: number of layers, each on the outputs of the one before.
        bias: whether to learn biases.
        batch_first: whether inputs and outputs are ``(batch, time, features)``.
        dropout: probability of dropout between layers, in training.
        bidirectional: whether to run a second layer backwards in time.
        block_size: as for :class:`BlockSparseLinear`, as the others.
        density: fraction of the blocks that are kept, of all weights.
        diagonal: whether to keep the diagonals of the recurrent weights besides: each unit's dependence on itself,
            which is nearly always needed.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: :math:`(T, B, \text{input\_size})`, :math:`(B, T, \text{input\_size})` with ``batch_first``, or
          :math:`(T, \text{input\_size})`; and optionally a state of shape :math:`(\text{num\_layers} \cdot
          \text{directions}, B, \text{hidden\_size})`, zero by default.
        - Output: the outputs of the last layer, and the last state, as of :class:`torch.nn.GRU`.

    Attributes:
        input_layers: a :class:`BlockSparseLinear` for each layer and direction, from its inputs to the gates reset,
            update and new, in this order.
        recurrent_layers: the same, from the states.

    Raises:
        TypeError: as for :class:`BlockSparseLinear`.
        ValueError: as there; or the input or the state is of another shape. Packed sequences are not taken.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.BlockSparseGRU(32, 64, block_size=(16, 4), density=0.2)
        >>> output, state = layer(torch.randn(10, 1, 32))
        >>> output.shape, state.shape
        (torch.Size([10, 1, 64]), torch.Size([1, 1, 64]))
        >>> output, state = layer(torch.randn(1, 1, 32), state)  # one more step
    """

    _dense = "GRU"
    _gates, _parts = 3, 1

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, (last,) = self._forward(input, None if hx is None else [hx])
        return output, last

    @classmethod
    def from_dense(
        cls,
        gru: nn.GRU,
        block_size: int | Sequence[int] = (16, 1),
        density: float = 0.1,
        diagonal: bool = True,
    ) -> "BlockSparseGRU":
        """The layer with those blocks of each of ``gru``'s weights that have the largest norm.

        Args:
            gru: the dense layer, which stays as it is.
            block_size: as for the class, as the others.
            density: ``round(density * blocks)`` blocks of each weight are kept.
            diagonal: whether to keep the diagonals of the recurrent weights besides.

        Raises:
            TypeError: as for the class.
            ValueError: as for the class; ``gru`` has projections, hooks or a replaced forward, or is something else.

        Example::

            >>> import torch, blockdiag
            >>> gru = torch.nn.GRU(32, 64)
            >>> sparse = blockdiag.BlockSparseGRU.from_dense(gru, (16, 4), density=1.0)
            >>> x = torch.randn(10, 1, 32)
            >>> torch.testing.assert_close(sparse(x)[0], gru(x)[0])
        """
        return cls._from_dense(gru, block_size, density, diagonal)  # type: ignore[return-value]

    def _layer(self, gates: Tensor, states: tuple[Tensor, ...], weight: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        output = torch.ops.blockdiag.sparse_gru(gates, states[0], *weight)
        return output, [output[-1]]


class BlockSparseLSTM(_BlockSparseRNN):
    r"""A :class:`torch.nn.LSTM` with block-sparse weights, for inference step by step and for training.

    Args:
        input_size: as for :class:`torch.nn.LSTM`, as the next six.
        hidden_size: number of features of the state; a multiple of both sides of a block.
        num_layers: number of layers, each on the outputs of the one before.
        bias: whether to learn biases.
        batch_first: whether inputs and outputs are ``(batch, time, features)``.
        dropout: probability of dropout between layers, in training.
        bidirectional: whether to run a second layer backwards in time.
        block_size: as for :class:`BlockSparseLinear`, as the others.
        density: fraction of the blocks that are kept, of all weights.
        diagonal: whether to keep the diagonals of the recurrent weights besides.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - Input: as :class:`BlockSparseGRU`, but a state is a pair of tensors, of hidden and cell states.
        - Output: the outputs of the last layer, and the last states, as of :class:`torch.nn.LSTM`.

    Attributes:
        input_layers: a :class:`BlockSparseLinear` for each layer and direction, from its inputs to the gates input,
            forget, cell and output, in this order.
        recurrent_layers: the same, from the states.

    Raises:
        TypeError: as for :class:`BlockSparseLinear`.
        ValueError: as there; or the input or a state is of another shape. Packed sequences are not taken.

    Examples::

        >>> import torch, blockdiag
        >>> layer = blockdiag.BlockSparseLSTM(32, 64, block_size=(16, 4), density=0.2)
        >>> output, (hidden, cell) = layer(torch.randn(10, 1, 32))
        >>> output.shape, cell.shape
        (torch.Size([10, 1, 64]), torch.Size([1, 1, 64]))
    """

    _dense = "LSTM"
    _gates, _parts = 4, 2

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        output, (hidden, cell) = self._forward(input, None if hx is None else list(hx))
        return output, (hidden, cell)

    @classmethod
    def from_dense(
        cls,
        lstm: nn.LSTM,
        block_size: int | Sequence[int] = (16, 1),
        density: float = 0.1,
        diagonal: bool = True,
    ) -> "BlockSparseLSTM":
        """The layer with those blocks of each of ``lstm``'s weights that have the largest norm.

        Args:
            lstm: the dense layer, which stays as it is.
            block_size: as for the class, as the others.
            density: ``round(density * blocks)`` blocks of each weight are kept.
            diagonal: whether to keep the diagonals of the recurrent weights besides.

        Raises:
            TypeError: as for the class.
            ValueError: as for the class; ``lstm`` has projections, hooks or a replaced forward, or is something else.

        Example::

            >>> import torch, blockdiag
            >>> lstm = torch.nn.LSTM(32, 64)
            >>> sparse = blockdiag.BlockSparseLSTM.from_dense(lstm, (16, 4), density=1.0)
            >>> x = torch.randn(10, 1, 32)
            >>> torch.testing.assert_close(sparse(x)[0], lstm(x)[0])
        """
        return cls._from_dense(lstm, block_size, density, diagonal)  # type: ignore[return-value]

    def _layer(self, gates: Tensor, states: tuple[Tensor, ...], weight: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        output, cell = torch.ops.blockdiag.sparse_lstm(gates, *states, *weight)
        return output, [output[-1], cell]


def _parameters(dense: nn.RNNBase, which: str, index: int, directions: int) -> tuple[Any, Any]:
    """Weight and bias of a layer of torch.nn, "ih" or "hh"; the bias may be None."""
    suffix = f"_l{index // directions}" + ("_reverse" if index % directions == 1 else "")
    return getattr(dense, f"weight_{which}{suffix}"), getattr(dense, f"bias_{which}{suffix}", None)
