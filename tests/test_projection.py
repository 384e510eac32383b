"""Projections against the theory of their errors, and against a numerical search for better ones."""

import itertools

import pytest
import torch
from torch import nn

from blockdiag import MonarchLinear
from blockdiag.compression.calibration import _patches
from blockdiag.compression.numerics import projection

STRUCTURES = [((1, 1), 3), ((4, 3), 1), ((3, 4), 2), ((6, 1), 2), ((1, 6), 2)]


def random_second(features, rows):
    x = torch.randn(rows, features, dtype=torch.float64) @ torch.randn(features, features, dtype=torch.float64)
    return x.mT @ x / rows


def composed(first, second, num_blocks, rank):
    layer = MonarchLinear(36, 24, num_blocks, rank, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.first.weight.copy_(first)
        layer.second.weight.copy_(second)
    return layer.weight.detach()


@pytest.mark.parametrize(("num_blocks", "rank"), STRUCTURES)
def test_monarch_projection_is_the_closed_form_optimum(num_blocks, rank):
    """By Eckart and Young the squared error is the sum of the squared singular values dropped from every submatrix."""
    weight = torch.randn(24, 36, dtype=torch.float64)
    result = composed(*projection.monarch(weight, num_blocks, rank, None), num_blocks, rank)
    left_out = 0.0
    for row in weight.chunk(num_blocks[1], 0):
        for submatrix in row.chunk(num_blocks[0], 1):
            left_out += torch.linalg.svdvals(submatrix)[rank:].square().sum()
    torch.testing.assert_close((weight - result).square().sum(), left_out)
    spectrum = projection.spectrum(weight, num_blocks, None)
    torch.testing.assert_close(spectrum[rank:].sum(), left_out)


@pytest.mark.parametrize(("num_blocks", "rank"), STRUCTURES)
def test_projection_recovers_what_has_the_structure(num_blocks, rank):
    layer = MonarchLinear(36, 24, num_blocks, rank, bias=False, dtype=torch.float64)
    weight = layer.weight.detach()
    for second in (None, random_second(36, 200)):
        result = composed(*projection.monarch(weight, num_blocks, rank, second), num_blocks, rank)
        torch.testing.assert_close(result, weight)


@pytest.mark.parametrize(("num_blocks", "rank"), STRUCTURES)
def test_projection_on_outputs_is_a_local_optimum(num_blocks, rank):
    """It is no worse than the projection of the weight, and gradient descent on the factors does not improve it."""
    weight, second = torch.randn(24, 36, dtype=torch.float64), random_second(36, 500)
    factors = projection.monarch(weight, num_blocks, rank, second, sweeps=1000, tolerance=1e-7)

    def error(factors):
        return projection.energy(weight - composed_differentiably(*factors, num_blocks, rank), second)

    assert error(factors) <= error(projection.monarch(weight, num_blocks, rank, None)) * (1 + 1e-9)
    start = error(factors).item()
    tuned = [factor.clone(memory_format=torch.contiguous_format).requires_grad_() for factor in factors]
    optimizer = torch.optim.LBFGS(tuned, max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = error(tuned)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert error(tuned).item() >= start * 0.995


def composed_differentiably(first, second, num_blocks, rank):
    in_blocks, out_blocks = num_blocks
    first, second = first.unflatten(1, (out_blocks, rank)), second.unflatten(2, (in_blocks, rank))
    return torch.einsum("lokr,klri->loki", second, first).flatten(2).flatten(0, 1)


@pytest.mark.parametrize(("num_blocks", "rank"), STRUCTURES)
def test_projection_on_fewer_inputs_than_features(num_blocks, rank):
    """The second moment is singular; every sweep still lowers the error."""
    weight, second = torch.randn(24, 36, dtype=torch.float64), random_second(36, 20)
    errors = []
    for sweeps in (1, 2, 4, 8):
        factors = projection.monarch(weight, num_blocks, rank, second, sweeps=sweeps, tolerance=0)
        errors.append(projection.energy(weight - composed(*factors, num_blocks, rank), second).item())
    start = composed(*projection.monarch(weight, num_blocks, rank, None), num_blocks, rank)
    errors.insert(0, projection.energy(weight - start, second).item())
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]


def test_low_rank_on_outputs_is_the_optimum():
    """The error is that of the singular values of W C^1/2, for every W."""
    weight, second = torch.randn(24, 36, dtype=torch.float64), random_second(36, 200)
    first, up = projection.monarch(weight, (1, 1), 5, second)
    singular = torch.linalg.svdvals(weight @ torch.linalg.cholesky(second))
    error = projection.energy(weight - up[0] @ first[0], second)
    torch.testing.assert_close(error, singular[5:].square().sum())
    torch.testing.assert_close(projection.spectrum(weight, (1, 1), second), singular.square())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_refitted_blocks_are_least_squares(dtype):
    x = torch.randn(300, 12, dtype=dtype) @ torch.randn(12, 12, dtype=dtype)
    weight = torch.randn(8, 12, dtype=dtype)
    rows, columns = torch.randperm(8), torch.randperm(12)
    blocks = projection.refit_blocks(weight, rows, columns, 4, x.mT @ x.conj() / len(x))
    outputs = x @ weight.mT
    for block, row, column in zip(blocks, rows.chunk(4), columns.chunk(4), strict=True):
        torch.testing.assert_close(block.mT, torch.linalg.lstsq(x[:, column], outputs[:, row]).solution)


@pytest.mark.parametrize(
    ("num_blocks", "out_features", "in_features"), [(2, 8, 8), (4, 16, 32), (8, 64, 32), (3, 9, 12)]
)
def test_permutations_find_hidden_blocks(num_blocks, out_features, in_features):
    blocks = torch.randn(num_blocks, out_features // num_blocks, in_features // num_blocks, dtype=torch.float64)
    hidden = torch.block_diag(*blocks)[torch.randperm(out_features)][:, torch.randperm(in_features)]
    energies = (hidden + 0.01 * torch.randn_like(hidden)).square()
    rows, columns = projection.find_permutations(energies, num_blocks)
    kept = projection.diagonal_blocks(energies, rows, columns, num_blocks).sum()
    assert kept > 0.995 * energies.sum()


def test_permutations_are_never_worse_than_none():
    for seed in range(5):
        torch.manual_seed(seed)
        energies = torch.rand(12, 18, dtype=torch.float64)
        rows, columns = projection.find_permutations(energies, 3)
        assert sorted(rows.tolist()) == list(range(12))
        assert sorted(columns.tolist()) == list(range(18))
        given = projection.diagonal_blocks(energies, torch.arange(12), torch.arange(18), 3).sum()
        assert projection.diagonal_blocks(energies, rows, columns, 3).sum() >= given
    zeros = torch.zeros(6, 6)
    assert [sorted(order.tolist()) for order in projection.find_permutations(zeros, 3)] == [list(range(6))] * 2


def test_scattering_undoes_gathering():
    matrix, rows, columns = torch.randn(6, 9), torch.randperm(6), torch.randperm(9)
    blocks = projection.diagonal_blocks(matrix, rows, columns, 3)
    assert torch.equal(blocks[1], matrix[rows[2:4]][:, columns[3:6]])
    dense = projection.scatter_blocks(blocks, rows, columns)
    assert torch.equal(dense[dense != 0], matrix[dense != 0])
    assert torch.equal(projection.diagonal_blocks(dense, rows, columns, 3), blocks)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(6, 4, 5, padding="same", padding_mode="circular"),
        nn.Conv2d(6, 4, (3, 2), stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=2, padding_mode="reflect"),
        nn.Conv2d(6, 4, 3, padding="valid"),
        nn.Conv3d(4, 6, (2, 3, 1), padding=(1, 0, 1), groups=2),
    ],
    ids=str,
)
def test_patches_are_what_a_convolution_multiplies(conv):
    input = torch.randn(2, conv.in_channels, *[12, 13, 7][: conv.weight.dim() - 2])
    weight = conv.weight.flatten(1).unflatten(0, (conv.groups, -1))
    output = (_patches(conv, input) @ weight.mT).movedim(0, -2).flatten(-2) + conv.bias
    torch.testing.assert_close(output, conv(input).movedim(1, -1).flatten(0, -2), rtol=1e-4, atol=1e-5)
