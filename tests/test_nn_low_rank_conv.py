"""LowRankConv, built like nn.Conv2d or from another convolution: it computes with the weight that it reports."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import blockdiag
from blockdiag import LowRankConv

CONVOLUTIONS = [
    nn.Conv1d(6, 8, 3, padding="same", padding_mode="circular"),
    nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    nn.Conv2d(6, 8, 1, groups=2, bias=False),
    nn.Conv3d(4, 6, (1, 2, 3), groups=2),
]


@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolution_computes_with_its_weight(conv):
    low_rank = LowRankConv.from_conv(conv, rank=2)
    x = torch.randn(2, conv.in_channels, *[9, 8, 7][: conv.weight.dim() - 2])
    composed = copy.deepcopy(conv)
    with torch.no_grad():
        composed.weight.copy_(low_rank.weight)
        if conv.bias is not None:
            composed.bias.copy_(low_rank.bias)
    torch.testing.assert_close(low_rank(x), composed(x))
    again = LowRankConv.from_conv(low_rank, rank=1)  # takes sizes and options from a factorized layer
    assert again(x).shape == conv(x).shape
    assert again.down.padding_mode == conv.padding_mode


@pytest.fixture
def two_threads():
    """With one thread, torch computes some convolutions differently, and loses the format of the outputs."""
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
    """Outputs have the convolution's memory format, after one conversion and after two."""
    if conv.weight.dim() == 5 and memory_format == torch.channels_last:
        memory_format = torch.channels_last_3d
    conv = copy.deepcopy(conv).to(memory_format=memory_format)
    layers = [LowRankConv.from_conv(conv, 3)]
    layers.append(LowRankConv.from_conv(layers[0], 2))  # not 1: torch treats a tensor with one channel as contiguous
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
    meta = LowRankConv.from_conv(conv.to("meta"), 3)
    assert meta.down.weight.is_meta
    assert meta.down.weight.is_contiguous(memory_format=memory_format)


def test_convolutions_take_over_what_they_are_made_from():
    conv = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", dtype=torch.float64).eval()
    for frozen in ("weight", "bias"):
        copied = copy.deepcopy(conv)
        getattr(copied, frozen).requires_grad_(False)
        layer = LowRankConv.from_conv(LowRankConv.from_conv(copied, 3), 2)
        assert not any(module.training for module in layer.modules())
        assert layer.down.weight.requires_grad == layer.up.weight.requires_grad == (frozen != "weight")
        assert layer.up.bias.requires_grad == (frozen != "bias")
        assert layer.down.padding_mode == "reflect"
        assert layer.up.bias.dtype == layer.down.weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("kernel_size", "kind"), [(3, nn.Conv2d), ((3,), nn.Conv1d), ((3, 2), nn.Conv2d), ((1, 2, 3), nn.Conv3d)], ids=str
)
def test_dimensions_are_read_off_the_kernel_size(kernel_size, kind):
    """Options are the convolution's, in its order, after the rank."""
    conv = kind(4, 6, kernel_size, 2, 1, 2, 2, False, "circular", dtype=torch.float64)
    layer = LowRankConv(4, 6, kernel_size, 3, 2, 1, 2, 2, False, "circular", dtype=torch.float64)
    assert type(layer.down) is type(layer.up) is kind
    assert layer.weight.shape == conv.weight.shape
    assert layer.bias is None
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer.down, name) == getattr(conv, name)
    with torch.no_grad():
        conv.weight.copy_(layer.weight)
    x = torch.randn(2, 4, *[9] * (conv.weight.dim() - 2), dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x))
    torch.testing.assert_close(layer(x[0]), conv(x[0]))  # one sample without a batch
    same = LowRankConv.from_conv(conv, 3)
    assert same.down.extra_repr() == layer.down.extra_repr()
    assert same.up.extra_repr() == layer.up.extra_repr()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRankConv.from_conv(nn.Conv1d(4, 4, 1), 0), "expected rank to be positive, but got 0"),
        (lambda: LowRankConv(4, 4, 3, 0), "expected rank to be positive, but got 0"),
        (lambda: LowRankConv(4, 4, 3, 2, groups=0), "expected groups to be positive, but got 0"),
        (lambda: LowRankConv(4, 4, (3, 0), 2), r"expected kernel_size to be positive, but got \(3, 0\)"),
        (lambda: LowRankConv(4, 4, 3, 2, stride=(1, 0)), r"expected stride to be positive, but got \(1, 0\)"),
        (lambda: LowRankConv(4, 4, 3, 2, dilation=0), "expected dilation to be positive, but got 0"),
        (lambda: LowRankConv(5, 4, 3, 2, groups=2), "expected in_channels to be a multiple of groups = 2, but got 5"),
        (lambda: LowRankConv(4, 5, 3, 2, groups=2), "expected out_channels to be a multiple of groups = 2, but got 5"),
        (lambda: LowRankConv(4, 4, (3, 3, 3, 3), 2), "expected kernel_size to have 1, 2 or 3 dimensions, but got"),
        (lambda: LowRankConv(4, 4, (), 2), "expected kernel_size to have 1, 2 or 3 dimensions, but got"),
        (
            lambda: LowRankConv(4, 4, (3,), 2, padding=(1, 1)),
            r"expected padding to be one number, or 1 as kernel_size, but got \(1, 1\)",
        ),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=f"LowRankConv: {message}"):
        make()


def test_sizes_of_numpy():
    layer = LowRankConv(4, 6, np.int64(3), np.int64(2), stride=np.int64(2), padding=np.array([1, 0]))
    assert layer.down.weight.shape == (2, 4, 3, 3)
    assert layer(torch.randn(1, 4, 9, 9)).shape == (1, 6, 5, 4)
    with pytest.raises(TypeError, match="'float' object cannot be interpreted as an integer"):
        LowRankConv(4, 6, 3, 2.5)


@pytest.mark.parametrize("other", [nn.Linear(4, 4), nn.ConvTranspose2d(4, 4, 3)], ids=lambda m: type(m).__name__)
def test_from_conv_of_other_modules(other):
    """A transposed convolution has all of the options, but computes something else."""
    with pytest.raises(TypeError, match=f"from_conv: expected a convolution, but got {type(other).__name__}"):
        LowRankConv.from_conv(other, 2)
