"""BlockDiagLinear behaves like nn.Linear wherever modules are handled."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import blockdiag
from blockdiag import BlockDiagLinear


@pytest.fixture
def layer(device):
    return BlockDiagLinear(12, 8, 4, device=device)


def test_computes_what_its_linears_compute(layer, device):
    x = torch.randn(5, 12, device=device)
    expected = torch.cat([linear(part) for linear, part in zip(layer.to_linears(), x.chunk(4, -1), strict=True)], -1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.view(5, 4, 3)), expected.view(5, 4, 2))
    torch.testing.assert_close(layer.to_dense()(x), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_conversions_round_trip(bias, device):
    linears = [nn.Linear(3, 2, bias=bias, device=device, dtype=torch.float64).eval() for _ in range(4)]
    linears[0].weight.requires_grad_(True)
    layer = BlockDiagLinear.from_linears(linears)
    assert type(layer) is BlockDiagLinear
    assert not layer.training
    for linear, block in zip(linears, layer.weight, strict=True):
        assert torch.equal(linear.weight, block)
    for before, after in zip(linears, layer.to_linears(), strict=True):
        torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)
        assert after.weight.data_ptr() != layer.weight.data_ptr()
    again = BlockDiagLinear.from_dense(layer.to_dense(), 4)
    torch.testing.assert_close(again.state_dict(), layer.state_dict(), rtol=0, atol=0)


def test_conversions_keep_frozen_parameters_frozen():
    linears = [nn.Linear(3, 2) for _ in range(4)]
    for linear in linears:
        linear.weight.requires_grad_(False)
    layer = BlockDiagLinear.from_linears(linears)
    for converted in (layer, layer.to_dense(), *layer.to_linears(), BlockDiagLinear.from_dense(layer.to_dense(), 2)):
        assert not converted.weight.requires_grad
        assert converted.bias.requires_grad


def test_from_dense_keeps_the_diagonal_blocks():
    dense = nn.Linear(6, 4)
    layer = BlockDiagLinear.from_dense(dense, 2)
    assert torch.equal(layer.weight[0], dense.weight[:2, :3])
    assert torch.equal(layer.weight[1], dense.weight[2:, 3:])
    assert torch.equal(layer.bias, dense.bias)


def test_initialized_as_its_own_linears():
    """Weight and bias are uniform within 1 / sqrt(in_block): mean and variance of many samples, and the bound."""
    layer = BlockDiagLinear(64 * 25, 64 * 500, 64)
    bound = 1 / math.sqrt(25)
    for parameter, count in ((layer.weight, layer.weight.numel()), (layer.bias, layer.bias.numel())):
        assert parameter.abs().max() <= bound
        assert parameter.mean().abs() < 5 * bound / math.sqrt(3 * count)
        assert abs(parameter.var().item() * 3 / bound**2 - 1) < 5 / math.sqrt(count)
    assert BlockDiagLinear(0, 4, 2).bias.abs().max() == 0  # like nn.Linear(0, 2)


def test_state_dict_across_devices_and_dtypes(layer):
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, map_location="cpu", weights_only=True)
    assert list(state) == ["weight", "bias"]
    other = BlockDiagLinear(12, 8, 4, dtype=torch.float64)
    other.load_state_dict(state)
    torch.testing.assert_close(other.weight.float(), layer.weight.cpu(), rtol=0, atol=0)
    meta = BlockDiagLinear(12, 8, 4, device="meta")
    meta.load_state_dict(state, assign=True)
    assert meta.weight.device.type == "cpu"
    with pytest.raises(RuntimeError, match="size mismatch"):
        BlockDiagLinear(12, 8, 2).load_state_dict(state)


def test_copies_and_pickles(layer, device):
    x = torch.randn(5, 12, device=device)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
        assert other.weight.data_ptr() != layer.weight.data_ptr()
        assert repr(other) == repr(layer)


def test_repr():
    assert repr(BlockDiagLinear(12, 8, 4, bias=False)) == (
        "BlockDiagLinear(in_features=12, out_features=8, num_blocks=4, bias=False)"
    )


def test_to(layer, device):
    x = torch.randn(5, 12, device=device)
    expected = layer(x)
    assert layer.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    layer.to("cpu", torch.float64)
    torch.testing.assert_close(layer(x.cpu().double()), expected.cpu().double(), rtol=1e-2, atol=1e-2)
    assert layer.half().weight.dtype == torch.float16


def test_meta_device_and_skip_init():
    with torch.device("meta"):
        layer = BlockDiagLinear(12, 8, 4)
    assert layer(torch.empty(3, 12, device="meta")).shape == (3, 8)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.weight.isfinite().all()
    assert nn.utils.skip_init(BlockDiagLinear, 12, 8, 4).weight.device.type == "cpu"


def test_parametrization(device):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = BlockDiagLinear(12, 8, 4, bias=False, device=device)
    x = torch.randn(5, 12, device=device)
    expected = 2 * layer(x)
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(layer(x), expected)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad is not None


def test_weight_norm_and_pruning(device):
    layer = BlockDiagLinear(12, 8, 4, device=device)
    x = torch.randn(5, 12, device=device)
    expected = layer(x)
    nn.utils.parametrizations.weight_norm(layer, dim=0)
    torch.testing.assert_close(layer(x), expected)
    pruned = prune.l1_unstructured(BlockDiagLinear(12, 8, 4, device=device), "weight", amount=0.5)
    assert (pruned.weight == 0).sum() == 12
    assert pruned(x).shape == (5, 8)


def test_trains_with_weight_decay_groups(device):
    """The usual groups for nn.Linear: weights decay, biases (one dimension) do not."""
    torch.manual_seed(0)
    net = nn.Sequential(BlockDiagLinear(12, 24, 4), nn.Tanh(), BlockDiagLinear(24, 4, 4)).to(device)
    decay = [parameter for parameter in net.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in net.parameters() if parameter.dim() <= 1]
    assert len(decay) == len(others) == 2
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}], lr=0.01
    )
    x = torch.randn(64, 12, device=device)
    target = x.view(64, 4, 3).sum(-1).sin()
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 5


def test_functional_call(layer, device):
    x = torch.randn(5, 12, device=device)
    state = {name: 3 * parameter for name, parameter in layer.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(layer, state, (x,)), 3 * layer(x))


def test_torch_ops_and_python_are_the_same_op(layer, device):
    x = torch.randn(5, 12, device=device)
    assert torch.equal(torch.ops.blockdiag.linear(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(torch.ops.blockdiag.linear(input=x, weight=layer.weight, bias=layer.bias), layer(x))
    assert torch.equal(blockdiag.linear(x, layer.weight), torch.ops.blockdiag.linear(x, layer.weight))


def test_attributes_of_parameters_carry_over():
    """Such as no_weight_decay, by which users group parameters: in every conversion of layers, and back."""
    linears = [torch.nn.Linear(4, 4) for _ in range(2)]
    for linear in linears:
        linear.weight.no_weight_decay, linear.bias._optim = True, {"lr": 0.1}
        linear.weight.mask = torch.ones(4, 4)  # not the shape of the new weight
    layers = [BlockDiagLinear.from_linears(linears), BlockDiagLinear.from_dense(linears[0], 2)]
    for layer in [*layers, *layers[0].to_linears(), layers[1].to_dense()]:
        assert layer.weight.no_weight_decay
        assert layer.bias._optim == {"lr": 0.1}
        assert not hasattr(layer.weight, "mask")
