"""The layers that stand in for dense ones: their dense weight is what they compute with."""

import copy

import pytest
import torch
from torch import nn

from blockdiag import BlockDiagLinear, LowRankConv, LowRankLinear, MonarchLinear, PermutedBlockDiagLinear
from blockdiag.factors import near_square_blocks

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


CONVOLUTIONS = [
    nn.Conv1d(6, 8, 3, padding="same", padding_mode="circular"),
    nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(6, 8, 1, groups=2, bias=False),
    nn.Conv3d(4, 6, (1, 2, 3), groups=2),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolution_computes_with_its_weight(conv):
    low_rank = LowRankConv(conv, rank=2)
    x = torch.randn(2, conv.in_channels, *[9, 8, 7][: conv.weight.dim() - 2])
    composed = copy.deepcopy(conv)
    with torch.no_grad():
        composed.weight.copy_(low_rank.weight)
        if conv.bias is not None:
            composed.bias.copy_(low_rank.bias)
    torch.testing.assert_close(low_rank(x), composed(x))
    again = LowRankConv(low_rank, rank=1)  # sizes and options from a factorised one
    assert again(x).shape == conv(x).shape
    assert again.down.padding_mode == conv.padding_mode


@pytest.mark.parametrize("permuted", ["neither", "input", "output", "both"])
def test_permuted(permuted, device):
    orders = {
        f"{name}_permutation": torch.randperm(size) if permuted in (name, "both") else None
        for name, size in (("input", 12), ("output", 8))
    }
    layer = PermutedBlockDiagLinear(12, 8, 4, **orders, device=device)
    x = torch.randn(5, 12, device=device)
    blocks = BlockDiagLinear(12, 8, 4, device=device)
    blocks.load_state_dict(layer.state_dict(), strict=False)
    order_in, order_out = (torch.arange(n) if o is None else o for n, o in zip((12, 8), orders.values(), strict=True))
    torch.testing.assert_close(layer(x), blocks(x[:, order_in])[:, order_out])
    torch.testing.assert_close(layer.to_dense()(x), layer(x))
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    torch.testing.assert_close(layer(x.view(5, 1, 12)), layer(x).view(5, 1, 8))
    assert layer(x[:0].view(0, 3, 12)).shape == (0, 3, 8)
    other = PermutedBlockDiagLinear(
        12, 8, 4, **{k: o if o is None else torch.arange(len(o)) for k, o in orders.items()}
    )
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.to(device)(x), layer(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankLinear(4, 4, 0), "LowRankLinear: expected rank to be positive, but got 0"),
        (lambda: LowRankConv(nn.Conv1d(4, 4, 1), 0), "LowRankConv: expected rank to be positive, but got 0"),
        (lambda: MonarchLinear(4, 4, 2, rank=0), "MonarchLinear: expected rank to be positive, but got 0"),
        (
            lambda: MonarchLinear(4, 6, (2, 4)),
            "expected out_features to be a multiple of its number of blocks 4, but got 6",
        ),
        (lambda: MonarchLinear(4, 6, 0), "expected in_features to be a multiple of its number of blocks 0, but got 4"),
        (
            lambda: PermutedBlockDiagLinear(4, 6, 2, input_permutation=torch.tensor([0, 1, 1, 2])),
            "expected input_permutation to be a permutation of 0 to 3, but got",
        ),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_permuted_layers_are_no_list_of_layers():
    layer = PermutedBlockDiagLinear(12, 8, 4, input_permutation=list(range(11, -1, -1)))
    with pytest.raises(NotImplementedError, match=r"use unpermuted\(\).to_linears\(\)"):
        layer.to_linears()
    assert len(layer.unpermuted().to_linears()) == 4
    with pytest.raises(ValueError, match=r"expected the last dimension to be 12, but got the shape \(5, 4, 3\)"):
        layer(torch.randn(5, 4, 3))


def test_near_square_blocks():
    assert [near_square_blocks(n) for n in (1, 7, 64, 768, 3072, 1000)] == [1, 1, 8, 24, 48, 25]
