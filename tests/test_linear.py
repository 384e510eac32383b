"""Values and gradients against the reference: shapes, dtypes, memory layouts."""

import pytest
import torch

import blockdiag
from reference import DTYPES, PROBLEMS, Problem, check, make, problem_id


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, "flat", "stacked"])
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=problem_id)
def test_values_and_gradients(problem, stacked, bias, dtype, device):
    input, weight, bias = make(problem, dtype, device, stacked=stacked, bias=bias)
    output = torch.ops.blockdiag.linear(input, weight, bias)
    check(torch.ops.blockdiag.linear, input, weight, bias, torch.randn_like(output))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_long_sums_of_many_narrow_blocks(dtype, device):
    """More blocks than take turns along the batch, where each takes several."""
    problem = Problem((600,), 45, 40, 40)
    input, weight, bias = make(problem, dtype, device)
    grad_output = torch.randn(problem.output_shape(False), device=device).to(dtype)
    check(torch.ops.blockdiag.linear, input, weight, bias, grad_output)


@pytest.mark.parametrize("out_block", [1, 2, 3])
def test_sums_over_a_long_batch_are_no_single_chain(out_block, device):
    """A chain of so many float32 additions of 0.1 is off by 4 %."""
    if device != "cpu" or not blockdiag.build_info()["cpu_gemm"].startswith("avx"):
        pytest.skip("a library sums here, perhaps in one chain")
    batch = 1 << 20
    weight = torch.zeros(1, out_block, 4, device=device, requires_grad=True)
    output = blockdiag.linear(torch.full((batch, 4), 0.1, device=device), weight)
    (grad,) = torch.autograd.grad(output, weight, torch.ones_like(output))
    torch.testing.assert_close(grad, torch.full_like(grad, 0.1 * batch), rtol=1e-4, atol=0)


def test_equals_a_loop_of_linears(device):
    linears = [torch.nn.Linear(64, 32, device=device) for _ in range(8)]
    input = torch.randn(128, 8 * 64, device=device)
    weight = torch.stack([linear.weight for linear in linears])
    bias = torch.cat([linear.bias for linear in linears])
    expected = torch.cat([linear(x) for linear, x in zip(linears, input.chunk(8, -1), strict=True)], -1)
    torch.testing.assert_close(blockdiag.linear(input, weight, bias), expected)


def test_empty_batch_gives_zero_gradients(device):
    input, weight, bias = make(Problem((0,), 3, 4, 5), torch.float32, device)
    blockdiag.linear(input, weight, bias).sum().backward()
    assert input.grad.shape == (0, 12)
    assert not weight.grad.any()
    assert not bias.grad.any()


def test_no_input_features_gives_the_bias(device):
    input, weight, bias = make(Problem((2,), 3, 0, 5), torch.float32, device)
    assert torch.equal(blockdiag.linear(input, weight, bias), bias.detach().expand(2, 15))
    assert not blockdiag.linear(input, weight).any()


def test_where_both_layouts_fit_the_input_is_concatenated(device):
    weight = torch.randn(3, 5, 0, device=device)
    assert blockdiag.linear(torch.randn(2, 3, 0, device=device), weight).shape == (2, 3, 15)
    weight = torch.randn(1, 5, 4, device=device)
    assert blockdiag.linear(torch.randn(2, 1, 4, device=device), weight).shape == (2, 1, 5)


def test_nan_and_infinity_stay_in_their_block(device):
    input, weight, bias = make(Problem((4,), 3, 5, 6), torch.float32, device)
    with torch.no_grad():
        input[1, 0], input[2, 7] = torch.nan, torch.inf
    output = blockdiag.linear(input, weight, bias).view(4, 3, 6)
    assert output[1, 0].isnan().all()
    assert not output[2, 1].isfinite().any()
    output[1, 0], output[2, 1] = 0, 0
    assert output.isfinite().all()


# ---- memory layouts ----


def offset_slice(tensor):
    """`tensor` one element into a larger buffer: aligned to its element only."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view_as(tensor).copy_(tensor)


def sliced(tensor):
    """Every other row, and the middle of each: more than twice the leading dimension."""
    *leading, last = tensor.shape
    buffer = (
        tensor.new_full((*leading[:-1], 2 * leading[-1], last + 6), torch.nan)
        if leading
        else tensor.new_empty(last + 6)
    )
    view = buffer[..., ::2, 3:-3] if leading else buffer[3:-3]
    return view.copy_(tensor)


def transposed(tensor):
    """A layout with the first dimension innermost."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def block_major(tensor):
    """A stacked tensor whose blocks are outermost: a contiguous (G, B, K), viewed as (B, G, K)."""
    return tensor.movedim(-2, 0).contiguous().movedim(0, -2)


def strided_last(tensor):
    """Every third element, which BLAS cannot address."""
    return tensor.new_full((*tensor.shape, 3), torch.nan)[..., 0].copy_(tensor)


def expanded(tensor):
    """The first element of each dimension, expanded: all strides 0."""
    return tensor[(slice(0, 1),) * tensor.dim()].expand_as(tensor)


def expanded_last(tensor):
    return tensor[..., :1].expand_as(tensor)


LAYOUTS = [offset_slice, sliced, transposed, strided_last, expanded, expanded_last]
TARGETS = [
    *((target, layout) for target in ("input", "weight", "bias", "grad_output") for layout in LAYOUTS),
    ("input", block_major),
    ("grad_output", block_major),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex128], ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
@pytest.mark.parametrize(("target", "layout"), TARGETS, ids=lambda value: getattr(value, "__name__", value))
def test_memory_layouts(target, layout, stacked, dtype, device):
    problem = Problem((3, 4), 5, 6, 7)
    input, weight, bias = (tensor.detach() for tensor in make(problem, dtype, device, stacked=stacked))
    grad_output = torch.randn(problem.output_shape(stacked), dtype=dtype, device=device)
    arguments = {"input": input, "weight": weight, "bias": bias, "grad_output": grad_output}
    arguments[target] = layout(arguments[target])
    for name in ("input", "weight", "bias"):
        arguments[name].requires_grad_()
    check(torch.ops.blockdiag.linear, **arguments)


@pytest.mark.parametrize("reduce", [torch.sum, torch.mean], ids=["sum", "mean"])
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
def test_gradient_of_a_reduction(reduce, stacked, device):
    """The gradient arrives expanded from one element, with stride 0."""
    input, weight, bias = make(Problem((6,), 3, 4, 5), torch.float64, device, stacked=stacked)
    actual = torch.autograd.grad(reduce(blockdiag.linear(input, weight, bias)), (input, weight, bias))
    dense = torch.nn.functional.linear(input.flatten(1), torch.block_diag(*weight), bias)
    expected = torch.autograd.grad(reduce(dense), (input, weight, bias))
    torch.testing.assert_close(actual, expected)


def test_input_shared_by_all_blocks(device):
    """One input, expanded over the blocks: read without a copy, and its gradient summed over them."""
    x = torch.randn(8, 6, dtype=torch.float64, device=device, requires_grad=True)
    _, weight, bias = make(Problem((8,), 3, 6, 5), torch.float64, device)
    output = blockdiag.linear(x.unsqueeze(1).expand(8, 3, 6), weight, bias)
    expected = torch.einsum("bk,gnk->bgn", x, weight) + bias.view(3, 5)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_overlapping_rows(device):
    """Windows over a signal: rows that overlap in memory, which BLAS's leading dimension cannot express."""
    signal = torch.randn(20, dtype=torch.float64, device=device)
    windows = signal.unfold(0, 12, 1)
    weight = torch.randn(3, 5, 4, dtype=torch.float64, device=device)
    check(torch.ops.blockdiag.linear, windows, weight)


def test_conjugate_and_negative_views(device):
    input, weight, bias = (t.detach() for t in make(Problem((6,), 3, 4, 5), torch.complex128, device))
    check(torch.ops.blockdiag.linear, input.conj(), weight, bias)
    check(torch.ops.blockdiag.linear, input, weight.conj(), bias.conj())
    real = torch.ops.blockdiag.linear(input.conj().imag, weight.real.contiguous(), bias.conj().imag)
    expected = torch.ops.blockdiag.linear(-input.imag, weight.real.contiguous(), -bias.imag)
    torch.testing.assert_close(real, expected)


@pytest.mark.parametrize("rows", [1, 8])
def test_long_sums_are_as_precise_as_those_of_torch(rows, device):
    """The other tests' error bound allows one chain of additions, which is too generous for long sums."""
    length = 100_000
    long, short = torch.randn(rows, length, device=device), torch.randn(24, length, device=device) / length**0.5

    def error(output):
        wide = long.double() @ short.double().T
        return (output.double() - wide).square().mean().sqrt()

    # On a GPU cuBLAS computes both sums, and may split only one of them.
    factor = 8 if device == "cpu" else 16
    theirs = error(torch.nn.functional.linear(long, short))
    assert error(blockdiag.linear(long, short.unsqueeze(0))) < factor * theirs
    # The same products as a weight gradient: sums over the batch.
    if rows > 1:
        gradient = torch.ops.blockdiag.linear_weight_grad(long.T.contiguous(), short.T.contiguous(), [1, rows, 24])
        assert error(gradient[0]) < factor * theirs
