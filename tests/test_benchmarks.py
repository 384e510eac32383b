"""The contestants of the benchmark compute the same layer, forward and backward."""

import pytest
import torch

import reference
from benchmarks.contestants import CONTESTANTS
from benchmarks.timing import Problem, make_steps, measure

PROBLEM = Problem(batch=6, num_blocks=3, in_block=4, out_block=5)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestant(name, device):
    weight = torch.randn(3, 5, 4, dtype=torch.float64, device=device)
    bias = torch.randn(15, dtype=torch.float64, device=device)
    x = torch.randn(6, 12, dtype=torch.float64, device=device, requires_grad=True)
    forward, parameters = CONTESTANTS[name](weight, bias)
    output, expected = forward(x), reference.linear(x, weight, bias)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x), torch.autograd.grad(expected.sum(), x))
    grads = torch.autograd.grad(forward(x).sum(), parameters)
    assert [grad.shape for grad in grads] == [parameter.shape for parameter in parameters]


def test_a_wrong_contestant_is_not_timed(monkeypatch):
    monkeypatch.setitem(CONTESTANTS, "wrong", lambda weight, bias: (lambda x: x.new_zeros(6, 15), []))
    with pytest.raises(AssertionError, match="wrong is wrong on 6, 3, 4->5"):
        make_steps(["ours", "wrong"], PROBLEM, torch.float32, torch.device("cpu"), backward=False)


@pytest.mark.parametrize("backward", [False, True])
def test_measure(backward, monkeypatch):
    monkeypatch.setattr("benchmarks.timing.ROUND_SECONDS", 1e-4)
    steps = make_steps(list(CONTESTANTS), PROBLEM, torch.float32, torch.device("cpu"), backward)
    results = measure(steps, 3, torch.device("cpu"))
    assert list(results) == list(CONTESTANTS)
    for times in results.values():
        assert 0 < times["low_us"] <= times["median_us"] <= times["high_us"]
        assert times["rounds"] == 3
