"""PermutedBlockDiagLinear: blocks between two permutations."""

import re
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from blockdiag import BlockDiagLinear, BlockDiagonal, PermutedBlockDiagLinear, compress


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
    blocks.load_state_dict(layer.blocks.state_dict())
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
        (
            lambda: PermutedBlockDiagLinear.from_blocks(BlockDiagLinear(4, 6, 2), None, [0, 1, 2, 3]),
            "expected output_permutation to be a permutation of 0 to 5, but got",
        ),
    ],
)
def test_bad_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_inputs():
    layer = PermutedBlockDiagLinear(12, 8, 4, input_permutation=list(range(11, -1, -1)))
    with pytest.raises(ValueError, match=r"expected the last dimension to be 12, but got the shape \(5, 4, 3\)"):
        layer(torch.randn(5, 4, 3))


def test_has_blocks():
    """The layer of blocks is a submodule with its full interface; weight and bias are its parameters."""
    layer = PermutedBlockDiagLinear(12, 8, 4, input_permutation=list(range(11, -1, -1)), dtype=torch.float64)
    assert type(layer.blocks) is BlockDiagLinear
    assert layer.weight is layer.blocks.weight
    assert layer.bias is layer.blocks.bias
    assert len(layer.blocks.to_linears()) == 4
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.blocks(x.flip(-1)))
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


@pytest.mark.parametrize("bias", [False, True])
def test_from_blocks(bias, device):
    blocks = BlockDiagLinear(4, 6, 2, bias=bias, device=device, dtype=torch.bfloat16).eval()
    state = torch.random.get_rng_state()
    layer = PermutedBlockDiagLinear.from_blocks(blocks, [3, 1, 2, 0], torch.arange(6).flip(0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert layer.blocks is blocks
    assert not layer.training
    assert layer.input_permutation.device == layer.output_permutation.device == blocks.weight.device
    x = torch.randn(5, 4, device=device, dtype=torch.bfloat16)
    assert torch.equal(layer(x), blocks(x[:, [3, 1, 2, 0]]).flip(-1))
    same = PermutedBlockDiagLinear(4, 6, 2, [3, 1, 2, 0], [5, 4, 3, 2, 1, 0], bias, device, torch.bfloat16)
    same.load_state_dict(layer.state_dict())
    assert repr(same) == repr(layer)


@pytest.mark.parametrize("other", [nn.Linear(4, 6), PermutedBlockDiagLinear(4, 6, 2)])
def test_from_blocks_of_other_modules(other):
    with pytest.raises(TypeError, match=f"expected blocks to be a BlockDiagLinear, but got {type(other).__name__}"):
        PermutedBlockDiagLinear.from_blocks(other)


def old_state(layer, prefix=""):
    """A state dict of version 0.1, in which the layer was a BlockDiagLinear."""
    return OrderedDict((f"{prefix}{key.removeprefix('blocks.')}", value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("orders", [(None, None), ([1, 0, 3, 2], None), ([1, 0, 3, 2], [5, 4, 3, 2, 1, 0])], ids=str)
def test_state_dicts_without_blocks_load(orders, bias, assign):
    layer, x = PermutedBlockDiagLinear(4, 6, 2, *orders, bias), torch.randn(5, 4)
    others = [order and list(range(len(order))) for order in orders]
    for device in ("cpu", "meta") if assign else ("cpu",):
        other = PermutedBlockDiagLinear(4, 6, 2, *others, bias, device=device)
        state = old_state(layer)
        before = list(state)
        other.load_state_dict(state, assign=assign)
        assert list(state) == before
        assert torch.equal(other(x), layer(x))


def test_state_dicts_without_blocks_load_in_models():
    def make():
        inner = nn.Sequential(PermutedBlockDiagLinear(4, 4, 2, [1, 0, 3, 2]), BlockDiagLinear(4, 4, 2))
        return nn.ModuleDict({"blocks": inner, "last": nn.Linear(4, 4), "twice": inner[0]})

    model, other = make(), make()
    state = {re.sub(r"(0|twice)\.blocks", r"\1", key): tensor for key, tensor in model.state_dict().items()}
    assert "blocks.0.weight" in state
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_state_dicts_without_blocks_load_where_the_weight_is_computed():
    layer, other = (PermutedBlockDiagLinear(4, 4, 2, [1, 0, 3, 2]) for _ in range(2))
    for each in (layer, other):
        parametrizations.weight_norm(each.blocks)
    other.load_state_dict(old_state(layer))
    x = torch.randn(5, 4)
    assert torch.equal(other(x), layer(x))


def test_state_dicts_that_do_not_fit():
    layer = PermutedBlockDiagLinear(4, 4, 2, [1, 0, 3, 2])
    for state in (layer.state_dict(), old_state(layer)):
        del state["bias" if "bias" in state else "blocks.bias"]
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks.bias"'):
            layer.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*other"):
            layer.load_state_dict({**state, "other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for blocks\.weight"):
        PermutedBlockDiagLinear(4, 4, 4, [1, 0, 3, 2]).load_state_dict(old_state(layer))


def test_state_dicts_without_blocks_load_in_subclasses():
    """Only what belongs to the blocks gets another name."""

    class Scaled(PermutedBlockDiagLinear):
        def __init__(self):
            super().__init__(4, 4, 2, [1, 0, 3, 2])
            self.scale, self.norm = nn.Parameter(torch.randn(4)), nn.LayerNorm(4)

    layer, other = Scaled(), Scaled()
    other.load_state_dict(old_state(layer))
    torch.testing.assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
    keys = layer.load_state_dict({**old_state(layer), "other": torch.zeros(1)}, strict=False)
    assert keys.unexpected_keys == ["other"]


def test_compression_takes_it_for_one_layer():
    model = nn.Sequential(PermutedBlockDiagLinear(8, 8, 2, [7, 6, 5, 4, 3, 2, 1, 0]), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"compressed already: \['0'\]"):
        compress(model, BlockDiagonal(2), "0*", progress=False)
    new, _ = compress(model, BlockDiagonal(2), "1", progress=False)
    assert type(new[0].blocks) is BlockDiagLinear
