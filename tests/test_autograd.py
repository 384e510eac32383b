"""Gradients: every order, any subset, and the tensors saved for them."""

import itertools
import weakref

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import blockdiag
from reference import Problem, linear, make, problem_id

SMALL = [
    Problem((3,), 2, 3, 4),
    Problem((2, 2), 3, 1, 2),
    Problem((), 2, 2, 3),
    Problem((2,), 1, 3, 2),
    Problem((0,), 2, 3, 2),
    Problem((2,), 2, 0, 3),
    Problem((2,), 2, 3, 0),
    Problem((2,), 0, 3, 2),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("bias", [None, "flat", "stacked"])
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
@pytest.mark.parametrize("problem", SMALL, ids=problem_id)
def test_gradcheck_and_gradgradcheck(problem, stacked, bias, dtype, device):
    arguments = make(problem, dtype, device, stacked=stacked, bias=bias)
    assert gradcheck(blockdiag.linear, arguments)
    assert gradgradcheck(blockdiag.linear, arguments)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_any_subset_of_gradients(wanted, device):
    arguments = make(Problem((3,), 2, 3, 4), torch.float64, device)
    for tensor, want in zip(arguments, wanted, strict=True):
        tensor.requires_grad_(want)
    assert gradcheck(blockdiag.linear, arguments)
    assert gradgradcheck(blockdiag.linear, arguments)


def test_backward_ops_are_differentiable_by_themselves(device):
    input, weight, _ = make(Problem((3,), 2, 3, 4), torch.complex128, device, stacked=True)
    grad_output = torch.randn(3, 2, 4, dtype=torch.complex128, device=device, requires_grad=True)
    ops = torch.ops.blockdiag
    for function, arguments in [
        (lambda g, w: ops.linear_input_grad(g, w, [3, 2, 3]), (grad_output, weight)),
        (lambda g, x: ops.linear_weight_grad(g, x, [2, 4, 3]), (grad_output, input)),
        (lambda g, x: ops.linear_weight_bias_grad(g, x, [2, 4, 3]), (grad_output, input)),
    ]:
        assert gradcheck(function, arguments)
        assert gradgradcheck(function, arguments)


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_of_weight_and_bias_at_once(stacked, device):
    input, weight, _ = make(Problem((2, 3), 2, 3, 4), torch.float64, device, stacked=stacked)
    grad_output = torch.randn(2, 3, *((2, 4) if stacked else (8,)), dtype=torch.float64, device=device)
    ops = torch.ops.blockdiag
    weight_grad, bias_grad = ops.linear_weight_bias_grad(grad_output, input, weight.shape)
    torch.testing.assert_close(weight_grad, ops.linear_weight_grad(grad_output, input, weight.shape))
    torch.testing.assert_close(bias_grad, grad_output.sum((0, 1)).view(2, 4))


def test_flat_bias_of_stacked_inputs_under_a_transposed_gradient():
    x, weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(15)
    bias = bias.double().requires_grad_()
    grad = torch.randn(5, 3, dtype=torch.float64).T
    torch.ops.blockdiag.linear(x, weight, bias).backward(grad)
    torch.testing.assert_close(bias.grad, grad.flatten())


def test_third_order(device):
    def third(function):
        arguments = [t.detach().clone().requires_grad_() for t in tensors]
        value = function(*arguments).pow(3).sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, arguments, create_graph=True)
            value = sum(grad.pow(2).sum() for grad in grads)
        return value

    tensors = make(Problem((3,), 2, 3, 4), torch.float64, device)
    torch.testing.assert_close(third(blockdiag.linear), third(linear))


def test_saves_only_input_and_weight_and_only_where_needed(device):
    """As in F.linear, the input is kept only for the weight's gradient, and the weight only for the input's."""
    saved = []
    for input_grad, weight_grad in itertools.product([False, True], repeat=2):
        input, weight, bias = make(Problem((3,), 2, 3, 4), torch.float32, device)
        input.requires_grad_(input_grad)
        weight.requires_grad_(weight_grad)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.data_ptr()), lambda _: None):
            blockdiag.linear(input, weight, bias)
        expected = {weight.data_ptr()} if input_grad else set()
        expected |= {input.data_ptr()} if weight_grad else set()
        assert set(saved) == expected


def test_graph_is_freed_without_the_garbage_collector(device):
    input, weight, bias = make(Problem((3,), 2, 3, 4), torch.float32, device)
    hidden = input * 2
    reference = weakref.ref(hidden)
    output = blockdiag.linear(hidden, weight, bias)
    del hidden
    output.sum().backward()
    del output
    assert reference() is None


def test_in_place_change_of_a_saved_tensor_is_caught(device):
    input, weight, bias = make(Problem((3,), 2, 3, 4), torch.float32, device)
    output = blockdiag.linear(input, weight, bias)
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_no_grad_and_inference_mode(device):
    input, weight, bias = make(Problem((3,), 2, 3, 4), torch.float32, device)
    expected = blockdiag.linear(input, weight, bias)
    assert expected.grad_fn is not None
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            actual = blockdiag.linear(input, weight, bias)
        assert not actual.requires_grad
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("bias", ["flat", "stacked"])
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
def test_gradients_share_no_memory_with_the_incoming_gradient(stacked, bias, device):
    """Without leading dimensions there is nothing to sum: the bias gradient is a copy."""
    arguments = make(Problem((), 2, 3, 4), torch.float32, device, stacked=stacked, bias=bias)
    output = blockdiag.linear(*arguments)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    assert torch.equal(arguments[2].grad.flatten(), grad_output.flatten())
    storages = {tensor.untyped_storage().data_ptr() for tensor in (grad_output, *(t.grad for t in arguments))}
    assert len(storages) == 4


def test_accumulation_retained_graphs_and_hooks(device):
    input, weight, bias = make(Problem((3,), 2, 3, 4), torch.float64, device)
    seen = []
    weight.register_hook(seen.append)
    output = blockdiag.linear(input, weight, bias)
    output.sum().backward(retain_graph=True)
    once = weight.grad.clone()
    output.sum().backward()
    assert torch.equal(weight.grad, 2 * once)
    assert len(seen) == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, device):
    from torch.utils.checkpoint import checkpoint

    input, weight, bias = make(Problem((3,), 2, 3, 4), torch.float64, device)
    checkpoint(blockdiag.linear, input, weight, bias, use_reentrant=use_reentrant).sum().backward()
    actual = (input.grad, weight.grad, bias.grad)
    expected = torch.autograd.grad(blockdiag.linear(input, weight, bias).sum(), (input, weight, bias))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("out_block", [1, 3, 16])
def test_gradient_of_the_bias_over_a_long_batch(out_block, device):
    """As precise as torch's sum: no chain of float32 additions runs along the batch."""
    rows = 1_000_000
    grad_output = torch.full((rows, 2 * out_block), 0.1, device=device)
    x = torch.zeros(rows, 2, device=device)
    _, grad = torch.ops.blockdiag.linear_weight_bias_grad(grad_output, x, [2, out_block, 1])
    exact = rows * grad_output[0, 0].double().item()
    assert (grad.double() - exact).abs().max() <= 1e-6 * exact
