"""LowRankLinear and MonarchLinear: they compute with the dense weight that they report."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from blockdiag import LowRankLinear, MonarchLinear
from blockdiag.compression.monarch import near_square_blocks

LAYERS = {
    "low rank": lambda **kw: LowRankLinear(12, 8, 3, **kw),
    "monarch": lambda **kw: MonarchLinear(12, 8, 2, **kw),
    "rectangular monarch": lambda **kw: MonarchLinear(12, 8, (3, 4), rank=2, **kw),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("bias", [False, True])
def test_computes_with_its_weight(make, bias, device):
    layer = make(bias=bias, device=device, dtype=torch.float64)
    x = torch.randn(5, 3, 12, device=device, dtype=torch.float64)
    assert layer.weight.shape == (8, 12)
    assert (layer.bias is not None) == bias
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    before = layer.weight
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_is_a_module_like_others(make):
    layer = make()
    x = torch.randn(4, 12)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    other = make()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))


def test_submatrices_of_monarch_have_its_rank():
    layer = MonarchLinear(30, 24, (5, 3), rank=2, dtype=torch.float64)
    for row in layer.weight.chunk(3, 0):
        for submatrix in row.chunk(5, 1):
            assert torch.linalg.matrix_rank(submatrix) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLinear(4, 4, 0), "LowRankLinear: expected rank to be positive, but got 0"),
        (lambda: MonarchLinear(4, 4, 2, rank=0), "MonarchLinear: expected rank to be positive, but got 0"),
        (
            lambda: MonarchLinear(4, 6, (2, 4)),
            "expected out_features to be a multiple of its number of blocks 4, but got 6",
        ),
        (lambda: MonarchLinear(4, 6, (2,)), r"expected num_blocks to be one number or two, but got \(2,\)"),
        (lambda: MonarchLinear(4, 6, 0), "expected in_features to be a multiple of its number of blocks 0, but got 4"),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_may_be_numbers_of_numpy():
    layer = MonarchLinear(8, 6, np.int64(2))
    assert layer(torch.randn(3, 8)).shape == (3, 6)
    assert MonarchLinear(8, 6, np.array([4, 3])).weight.shape == (6, 8)


def test_near_square_blocks():
    assert [near_square_blocks(n) for n in (0, 1, 7, 64, 768, 3072, 1000)] == [1, 1, 1, 8, 24, 48, 25]
