"""The definition of the block-sparse linear op, with problems and tolerances: those of reference.py."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from reference import assert_within, wide_copy


class SparseProblem(NamedTuple):
    """The sizes of one layer; `batch` is the shape of the leading dimensions."""

    batch: tuple[int, ...]
    rows: int  # of blocks
    cols: int
    block_size: tuple[int, int]
    density: float

    @property
    def in_features(self) -> int:
        return self.cols * self.block_size[1]

    @property
    def out_features(self) -> int:
        return self.rows * self.block_size[0]

    def __str__(self) -> str:
        batch = "x".join(map(str, self.batch)) or "none"
        return f"B{batch}-{self.rows}x{self.cols}-of-{self.block_size[0]}x{self.block_size[1]}-{self.density}"


_SIZES = (1, 4, 8, 16, 32)
PROBLEMS = [
    *(SparseProblem((37,), 5, 7, (n, k), 0.4) for n in _SIZES for k in _SIZES),  # odd numbers of rows and columns
    *(SparseProblem((3,), 4, 9, (n, k), 0.5) for n in _SIZES for k in _SIZES),
    *(
        SparseProblem((1,), 6, 11, size, 0.5)
        for size in ((16, 1), (16, 4), (32, 8), (64, 16), (48, 32), (8, 1), (8, 8))
    ),
    *(SparseProblem((20,), 3, 4, size, 0.6) for size in ((3, 5), (17, 2), (48, 3), (64, 20), (100, 7), (2, 33))),
    SparseProblem((300,), 9, 40, (16, 1), 0.1),  # several parts of the batch
    SparseProblem((300,), 40, 9, (1, 16), 0.1),
    SparseProblem((129,), 20, 21, (4, 4), 0.2),
    SparseProblem((16,), 30, 300, (16, 1), 0.1),
    SparseProblem((2,), 8, 700, (16, 4), 0.9),  # long sums
    SparseProblem((33,), 1, 1, (16, 4), 1.0),
    SparseProblem((33,), 4, 4, (16, 4), 1.0),
    SparseProblem((9,), 4, 6, (16, 4), 0.0),  # no block
    SparseProblem((2,), 4, 6, (16, 1), 0.0),
    SparseProblem((), 4, 6, (16, 1), 0.5),
    SparseProblem((2, 3, 4), 4, 6, (16, 4), 0.3),
    SparseProblem((0,), 4, 6, (16, 4), 0.3),
    SparseProblem((3, 0), 4, 6, (16, 4), 0.3),
    SparseProblem((5,), 0, 6, (16, 4), 0.0),
    SparseProblem((5,), 4, 0, (16, 4), 0.0),
    SparseProblem((5,), 0, 0, (16, 4), 0.0),
]


class Layer(NamedTuple):
    """The arguments of the op; those that are differentiable require gradients."""

    input: Tensor
    values: Tensor
    crow_indices: Tensor
    col_indices: Tensor
    bias: Tensor | None
    diagonal: Tensor | None


def positions(problem: SparseProblem, index_dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    """Random ones: crow_indices and col_indices. Some rows may be empty, others full."""
    kept = torch.rand(problem.rows, problem.cols) < problem.density
    if problem.rows > 2 and 0 < problem.density < 1:
        kept[0], kept[1] = False, True
    crow_indices = torch.zeros(problem.rows + 1, dtype=index_dtype)
    crow_indices[1:] = kept.sum(1).cumsum(0)
    return crow_indices, kept.nonzero()[:, 1].to(index_dtype)


def make(
    problem: SparseProblem,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    bias: bool = True,
    diagonal: bool = False,
    index_dtype: torch.dtype = torch.int32,
) -> Layer:
    crow_indices, col_indices = positions(problem, index_dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    return Layer(
        random(*problem.batch, problem.in_features),
        random(len(col_indices), *problem.block_size),
        crow_indices.to(device),
        col_indices.to(device),
        random(problem.out_features) if bias else None,
        random(problem.out_features) if diagonal else None,
    )


def dense_weight(values: Tensor, crow_indices: Tensor, col_indices: Tensor, in_features: int) -> Tensor:
    """Block by block: differentiable, in the dtype of the values."""
    (_, out_block, in_block), crow, col = values.shape, crow_indices.tolist(), col_indices.tolist()
    rows = []
    for begin, end in itertools.pairwise(crow):
        blocks = [values.new_zeros(out_block, in_block)] * (in_features // in_block)
        for block in range(begin, end):
            blocks[col[block]] = values[block]
        rows.append(torch.cat(blocks, 1) if blocks else values.new_zeros(out_block, 0))
    weight = torch.cat(rows) if rows else values.new_zeros(0, in_features)
    return weight + 0 * values.sum()  # depends on the values even if there are none


def sparse_linear(
    input: Tensor, values: Tensor, bias: Tensor | None, diagonal: Tensor | None, indices: tuple[Tensor, Tensor]
) -> Tensor:
    """The definition, with the dense weight."""
    output = input @ dense_weight(values, *indices, input.shape[-1]).mT
    output = output if bias is None else output + bias
    if diagonal is None:
        return output
    copies = len(diagonal) // max(input.shape[-1], 1)  # of the input, one for each square matrix
    return output + torch.cat([input] * copies, -1) * diagonal


def check(layer: Layer, grad_output: Tensor | None = None, op=torch.ops.blockdiag.sparse_linear) -> Tensor:
    """Runs the op and, given a `grad_output`, its backward pass; compares all results with the definition in double."""
    input, values, crow_indices, col_indices, bias, diagonal = layer
    dtype, indices = input.dtype, (crow_indices.cpu(), col_indices.cpu())
    given = [input, values, bias, diagonal]
    wide = [wide_copy(tensor) for tensor in given]
    absolute = [None if t is None else t.detach().abs().requires_grad_() for t in wide]
    expected, magnitude = sparse_linear(*wide, indices), sparse_linear(*absolute, indices)
    actual = op(*layer)
    assert actual.is_contiguous()
    assert actual.device == input.device
    terms = input.shape[-1] + 2
    twice = _second(layer) if actual.is_cuda else None
    assert_within("output", actual, expected.detach(), magnitude.detach(), terms, dtype, rounded=twice)
    if grad_output is None:
        return actual
    wanted = [index for index, tensor in enumerate(given) if tensor is not None and tensor.requires_grad]
    got = torch.autograd.grad(actual, [given[i] for i in wanted], grad_output, retain_graph=True)
    wide_grad = wide_copy(grad_output.detach())
    want = torch.autograd.grad(expected, [wide[i] for i in wanted], wide_grad)
    sizes = torch.autograd.grad(magnitude, [absolute[i] for i in wanted], wide_grad.abs())
    batch = input.shape[:-1].numel()
    lengths = (len(crow_indices) * values.shape[1] + 2, batch, batch, batch)
    for i, a, e, m in zip(wanted, got, want, sizes, strict=True):
        name = ("grad input", "grad values", "grad bias", "grad diagonal")[i]
        assert_within(name, a, e, m, lengths[i], dtype, rounded=_second(layer))
    return actual


def _second(layer: Layer) -> torch.dtype | None:
    """The gradients' shares of blocks and diagonal are rounded before they are added; so is all on a GPU."""
    return None if layer.diagonal is None else layer.input.dtype
