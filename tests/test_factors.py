"""The layers that stand in for dense ones: their dense weight is what they compute with."""

import copy

import pytest
import torch
from torch import nn

import blockdiag
from blockdiag import BlockDiagLinear, LowRankConv, LowRankLinear, MonarchLinear, PermutedBlockDiagLinear
from blockdiag.nn.factors import near_square_blocks

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
    again = LowRankConv(low_rank, rank=1)  # sizes and options from a factorized one
    assert again(x).shape == conv(x).shape
    assert again.down.padding_mode == conv.padding_mode


@pytest.fixture
def two_threads():
    """On one, torch computes some convolutions otherwise, and in doing so loses the format of the outputs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv3d(8, 6, 3), nn.Conv3d(8, 8, 1)],
)
def test_memory_format_of_convolutions(conv, memory_format, two_threads):
    """Outputs, too, are laid out as the convolution's; after a conversion, and another."""
    if conv.weight.dim() == 5 and memory_format == torch.channels_last:
        memory_format = torch.channels_last_3d
    conv = copy.deepcopy(conv).to(memory_format=memory_format)
    layers = [LowRankConv(conv, 3)]
    layers.append(LowRankConv(layers[0], 2))  # not 1: torch takes a tensor of one channel for contiguous
    if conv.groups == 1:
        model, _ = blockdiag.compress(nn.Sequential(conv), blockdiag.LowRank(rank=3, min_features=1), progress=False)
        lower, _ = blockdiag.compress(model, blockdiag.LowRank(rank=2), progress=False)
        layers += [model[0], lower[0]]
        assert [layer.rank for layer in layers] == [3, 2, 3, 2]
    for layer in layers:
        for part in (layer.down, layer.up):
            assert part.weight.is_contiguous(memory_format=memory_format)
        x = torch.randn(2, 8, *[5] * (conv.weight.dim() - 2))
        for given in (x, x.to(memory_format=memory_format)):
            assert layer(given).stride() == conv(given).stride()
    meta = LowRankConv(conv.to("meta"), 3)
    assert meta.down.weight.is_meta
    assert meta.down.weight.is_contiguous(memory_format=memory_format)


def test_convolutions_take_over_what_they_are_made_from():
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64).eval()
    for frozen in ("weight", "bias"):
        copied = copy.deepcopy(conv)
        getattr(copied, frozen).requires_grad_(False)
        layer = LowRankConv(LowRankConv(copied, 3), 2)
        assert not any(module.training for module in layer.modules())
        assert layer.down.weight.requires_grad == layer.up.weight.requires_grad == (frozen != "weight")
        assert layer.up.bias.requires_grad == (frozen != "bias")
        assert layer.down.padding_mode == "reflect"
        assert layer.up.bias.dtype == layer.down.weight.dtype == torch.float64


@pytest.mark.parametrize("given", ["list", "tensor", "int32", "strided", "array"])
def test_permutations_are_taken_in_any_form(given):
    order = [2, 0, 3, 1]
    tensor = torch.tensor(order)
    forms = {"list": order, "tensor": tensor, "int32": tensor.int(), "array": tensor.numpy()}
    permutation = forms.get(given, torch.stack([tensor, tensor], 1)[:, 0])
    layer = PermutedBlockDiagLinear(4, 4, 2, permutation, permutation)
    for buffer in layer.buffers():
        assert buffer.dtype == torch.int64
        assert buffer.is_contiguous()
        assert buffer.tolist() == order
    layer.input_permutation.zero_()
    assert layer.output_permutation.tolist() == tensor.tolist() == order


def test_permutations_on_the_meta_device():
    order = torch.tensor([2, 0, 3, 1])
    layer = PermutedBlockDiagLinear(4, 4, 2, order.to("meta"), order, device="meta")
    assert layer.input_permutation.is_meta
    with torch.device("meta"):
        layer = PermutedBlockDiagLinear(4, 4, 2, order, order.tolist())
        with pytest.raises(ValueError, match="expected output_permutation to be a permutation of 0 to 3, but got"):
            PermutedBlockDiagLinear(4, 4, 2, None, [0, 1, 1, 2])
    assert layer.input_permutation.is_meta
    with pytest.raises(ValueError, match="expected input_permutation to be a permutation of 0 to 3, but got"):
        PermutedBlockDiagLinear(4, 4, 2, torch.empty(5, dtype=torch.int64, device="meta"), device="meta")
    with pytest.raises(ValueError, match=r"to have values, as the parameters on cpu, but it is on the meta"):
        PermutedBlockDiagLinear(4, 4, 2, order.to("meta"))


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
        (
            lambda: PermutedBlockDiagLinear(4, 6, 2, output_permutation=torch.arange(6).view(2, 3)),
            "expected output_permutation to be a permutation of 0 to 5, but got",
        ),
        (
            lambda: PermutedBlockDiagLinear(4, 6, 2, input_permutation=torch.tensor(3)),
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
