"""Autocast applies to the same arguments as for F.linear, on every device and to every dtype.

How mixed dtypes are computed is tested in test_mixed_dtypes.py.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import blockdiag
from reference import Problem, make

HALVES = [torch.float16, torch.bfloat16]


def close(actual, expected, dtype):
    """Equal up to a few roundings of `dtype`: both sides compute in it, but may round in different orders."""
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
def test_forward_inside_backward_outside(stacked, dtype, device):
    input, weight, bias = make(Problem((16,), 4, 8, 6), torch.float32, device, stacked=stacked)
    with torch.autocast(device, dtype=dtype):
        output = blockdiag.linear(input, weight, bias)
        dense = F.linear(input.flatten(1), torch.block_diag(*weight), bias)
    assert output.dtype == dense.dtype == dtype
    close(output.flatten(1), dense, dtype)
    wanted = (input, weight, bias)
    actual = torch.autograd.grad(output.float().square().mean(), wanted)
    expected = torch.autograd.grad(dense.float().square().mean(), wanted)
    assert all(grad.dtype == torch.float32 for grad in actual)
    close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_other_half_type_is_cast(dtype, device):
    """Tensors that the op does not take beside autocast's dtype are cast, as F.linear's are."""
    (other,) = (half for half in HALVES if half != dtype)
    input, weight, bias = (tensor.detach() for tensor in make(Problem((16,), 4, 8, 6), torch.float32, device))
    expected = blockdiag.linear(input.to(other).to(dtype), weight.to(dtype), bias.to(dtype))
    with torch.autocast(device, dtype=dtype):
        assert torch.equal(blockdiag.linear(input.to(other), weight, bias), expected)


def test_double_is_left_alone(device):
    input, weight, bias = make(Problem((4,), 2, 3, 5), torch.float64, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert blockdiag.linear(input, weight, bias).dtype == torch.float64


def test_disabled_region(device):
    input, weight, bias = make(Problem((4,), 2, 3, 5), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16), torch.autocast(device, enabled=False):
        assert blockdiag.linear(input, weight, bias).dtype == torch.float32


def test_backward_inside_the_region(device):
    input, weight, bias = make(Problem((4,), 2, 3, 5), torch.float32, device)
    blockdiag.linear(input, weight, bias).sum().backward()
    expected = (input.grad, weight.grad)
    input.grad = weight.grad = None
    with torch.autocast(device, dtype=torch.bfloat16):
        with torch.autocast(device, enabled=False):
            output = blockdiag.linear(input, weight, bias)
        output.sum().backward()
    assert torch.equal(input.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, dtype, device):
    input, weight, bias = make(Problem((16,), 4, 8, 6), torch.float32, device)

    def gradients(function):
        for tensor in (input, weight, bias):
            tensor.grad = None
        with torch.autocast(device, dtype=dtype):
            output = function(input, weight, bias)
        output.float().square().mean().backward()
        return input.grad, weight.grad, bias.grad

    def checkpointed(*arguments):
        return checkpoint(blockdiag.linear, *arguments, use_reentrant=use_reentrant)

    torch.testing.assert_close(gradients(checkpointed), gradients(blockdiag.linear))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_training_with_a_grad_scaler(dtype, device):
    """A step whose gradients overflow is skipped, and the others train."""
    layer = blockdiag.BlockDiagLinear(16, 8, 4, device=device)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**8)
    input = torch.randn(32, 16, device=device)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=dtype):
            loss = layer(input).float().square().mean() * (torch.inf if step == 3 else 1)
        before = layer.weight.detach().clone()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 3:
            assert torch.equal(layer.weight, before)
        else:
            losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
