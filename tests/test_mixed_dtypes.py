"""float32 tensors beside those of a half type: what autocast computes with, and what calls with an out_dtype take."""

import itertools
from functools import partial

import pytest
import torch
from test_memory import allocated, allowed_beside_results, result_bytes, warm_up
from torch.nn import functional as F

import blockdiag
from reference import Problem, check, make, problem_id

OPS = torch.ops.blockdiag
HALVES = [torch.float16, torch.bfloat16]
PROBLEMS = [
    Problem((128,), 4, 64, 64),
    Problem((7,), 3, 5, 11),
    Problem((), 4, 6, 2),
    Problem((2, 3, 4), 2, 9, 10),
    Problem((2000,), 2, 3, 4),
    Problem((9,), 2, 300, 270),  # larger than a tile
    Problem((2,), 2, 520, 530),  # few rows of long blocks
    Problem((3,), 1, 600, 513),  # a sum over three rows, in wide results
    Problem((33,), 5, 17, 1),
    Problem((33,), 5, 1, 17),
    Problem((300,), 2, 70, 2),  # few outputs
    Problem((300,), 3, 96, 1),
    Problem((21,), 2, 531, 35),  # dot products of some rows
    Problem((600,), 2, 40, 40),  # a long sum over the batch
    Problem((0,), 3, 4, 5),
    Problem((6,), 3, 0, 5),
]


def mixed(problem, dtypes, device, **options):
    """Random tensors of these dtypes."""
    tensors = make(problem, torch.float32, device, **options)
    return tuple(
        None if tensor is None else tensor.detach().to(dtype).requires_grad_()
        for tensor, dtype in zip(tensors, dtypes, strict=True)
    )


def converts(device: str, half: torch.dtype) -> bool:
    """Whether the kernels multiply float32 operands as they are: not if they multiply half types natively, or cast."""
    kernels = {"avx2", "avx512"} | ({"avx512_bf16"} if half == torch.float16 else set())
    return device == "cpu" and blockdiag.build_info()["cpu_gemm"] in kernels


def rounded_to(device: str, half: torch.dtype) -> torch.dtype | None:
    return None if converts(device, half) else half


def under_autocast(device: str, half: torch.dtype, *tensors):
    with torch.autocast(device, dtype=half):
        return blockdiag.linear(*tensors)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=problem_id)
def test_values_and_gradients(problem, half, device):
    """Every gradient has the dtype of its tensor, and is precise to that dtype."""
    op, rounded = partial(under_autocast, device, half), rounded_to(device, half)
    biases = itertools.cycle(("flat", "stacked", None))
    for dtypes in itertools.product((torch.float32, half), repeat=3):
        for stacked in (False, problem.in_block > 0):
            tensors = mixed(problem, dtypes, device, stacked=stacked, bias=next(biases))
            grad_output = torch.randn(problem.output_shape(stacked), dtype=half, device=device)
            check(op, *tensors, grad_output=grad_output, dtype=half, rounded=rounded)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_strided_operands(half, device):
    """Slices, transposed weights and expanded gradients."""
    op = partial(under_autocast, device, half)
    problem = Problem((12,), 3, 10, 7)
    input, weight, bias = mixed(problem, (half, torch.float32, torch.float32), device)
    wide = torch.cat([input.detach()] * 2, -1)[:, :30].requires_grad_()
    transposed = weight.detach().mT.contiguous().mT.requires_grad_()
    gradients = [
        torch.randn(12, 42, dtype=half, device=device)[:, ::2],
        torch.randn(21, 12, dtype=half, device=device).T,
        torch.ones((), dtype=half, device=device).expand(12, 21),
    ]
    for x, w, grad_output in itertools.product((input, wide), (weight, transposed), gradients):
        check(op, x, w, bias, grad_output=grad_output, dtype=half, rounded=rounded_to(device, half))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_the_weights_gradient_is_closer_than_that_of_a_linear_layer(half, device):
    if not converts(device, half):
        pytest.skip("operands are cast here")
    input, weight, bias = mixed(Problem((128,), 1, 256, 192), (half, torch.float32, torch.float32), device)
    grad_output = torch.randn(128, 192, dtype=half, device=device)

    def gradients(function, w, b):
        with torch.autocast(device, dtype=half):
            output = function(input, w, b)
        return torch.autograd.grad(output, (w, b), grad_output)

    ours = gradients(blockdiag.linear, weight, bias)
    dense = gradients(F.linear, weight.detach()[0].requires_grad_(), bias)
    exact = (grad_output.double().T @ input.detach().double(), grad_output.double().sum(0))
    for of_ours, of_dense, expected in zip(ours, dense, exact, strict=True):
        assert of_ours.dtype == torch.float32
        error, error_of_dense = (
            (grad.double().view_as(expected) - expected).abs().max() for grad in (of_ours, of_dense)
        )
        assert error < error_of_dense / 100


def test_gradients_beyond_the_range_of_float16(device):
    """A float32 weight's gradient overflows only where float32 does."""
    in_float32 = device == "cuda" and blockdiag.build_info()["cuda_gemm"] in ("fused", "small_blocks")
    if not in_float32 and not converts(device, torch.float16):
        pytest.skip("results are cast here")
    input, weight, bias = mixed(Problem((64,), 2, 8, 8), (torch.float16, torch.float32, torch.float32), device)
    input = torch.full_like(input, 100)
    output = under_autocast(device, torch.float16, input, weight, bias)
    weight_grad, bias_grad = torch.autograd.grad(output, (weight, bias), torch.full_like(output, 2000))
    assert (weight_grad == 64 * 100 * 2000).all()
    assert (bias_grad == 64 * 2000).all()


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_nothing_of_the_tensors_sizes_is_allocated(half, device):
    """Beside the results, forward and backward."""
    if not converts(device, half):
        pytest.skip("operands are cast here")
    # The weight in a half type takes 8 MiB, and the input 2 MiB.
    dtypes = (torch.float32, torch.float32, torch.float32)
    tensors = mixed(Problem((128,), 16, 512, 512), dtypes, device)

    def forward():
        return under_autocast(device, half, *tensors)

    peak, output = allocated(forward, device)
    assert output.dtype == half
    assert peak <= result_bytes(output) + allowed_beside_results(device)
    grad_output = torch.randn_like(output)

    def backward():
        return torch.autograd.grad(output, tensors, grad_output, retain_graph=True)

    peak, grads = allocated(backward, device)
    assert peak <= result_bytes(*grads) + allowed_beside_results(device)


def test_one_row_allocates_the_output_alone(device):
    """Not even scratch memory for a tile, which the limits of test_memory.py leave room for."""
    if not converts(device, torch.float16):
        pytest.skip("operands are cast here")
    input, weight, _ = mixed(Problem((1,), 64, 512, 512), (torch.float16, torch.float32, torch.float32), device)
    warm_up(lambda: under_autocast(device, torch.float16, input, weight), device)
    with torch.no_grad():
        peak, output = allocated(lambda: under_autocast(device, torch.float16, input, weight), device)
    assert peak == result_bytes(output)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("out_dtype", ["half", "single"])
def test_explicit_out_dtype(out_dtype, half, device):
    """The ops take any mixture, and give what they are asked for, under autocast too."""
    out_dtype = half if out_dtype == "half" else torch.float32
    problem, rounded = Problem((6,), 2, 3, 4), rounded_to(device, half)
    for dtypes in itertools.product((torch.float32, half), repeat=3):
        tensors = mixed(problem, dtypes, device)
        grad_output = torch.randn(6, 8, dtype=out_dtype, device=device)
        for enabled in (False, True):
            with torch.autocast(device, dtype=half, enabled=enabled):
                op = partial(OPS.linear, out_dtype=out_dtype)
                check(op, *tensors, grad_output=grad_output, dtype=out_dtype, rounded=rounded)
        x, w, _ = (tensor.detach() for tensor in tensors)
        y = torch.randn(6, 8, device=device).to(dtypes[2])
        assert OPS.linear_input_grad(y, w, [6, 6], out_dtype=out_dtype).dtype == out_dtype
        weight_grad = OPS.linear_weight_grad(y, x, [2, 4, 3], out_dtype=out_dtype)
        assert weight_grad.dtype == out_dtype
        both = OPS.linear_weight_bias_grad(y, x, [2, 4, 3], out_dtype=out_dtype)
        assert torch.equal(both[0], weight_grad)
        torch.testing.assert_close(both[1], y.double().sum(0).view(2, 4).to(out_dtype))


def test_a_float32_call_keeps_the_range_of_float32(device):
    """Beside a half input, forward and backward."""
    input, weight, bias = mixed(Problem((64,), 2, 8, 8), (torch.float16, torch.float32, torch.float32), device)
    input = torch.ones_like(input).requires_grad_()
    for scale in (1e-9, 1e5):
        output = OPS.linear(input, weight.detach() * 0, torch.full_like(bias, scale), out_dtype=torch.float32)
        torch.testing.assert_close(output, torch.full_like(output, scale))
        output = OPS.linear(input.detach(), weight, bias, out_dtype=torch.float32)
        grads = torch.autograd.grad(output, (weight, bias), torch.full_like(output, scale))
        for grad in grads:
            torch.testing.assert_close(grad, torch.full_like(grad, 64 * scale))


def test_explicit_out_dtype_of_one_dtype(device):
    """Any dtype that all tensors have."""
    for dtype in (torch.float32, torch.float64, torch.complex64):
        tensors = make(Problem((5,), 2, 3, 4), dtype, device)
        grad_output = torch.randn(5, 8, dtype=dtype, device=device)
        check(partial(OPS.linear, out_dtype=dtype), *tensors, grad_output=grad_output)


@pytest.mark.parametrize(
    ("dtypes", "out_dtype", "message"),
    [
        ("hfd", "h", "expected bias to be float32 or float16, as out_dtype is float16, but got float64"),
        ("bff", "h", "expected input to be float32 or float16, as out_dtype is float16, but got bfloat16"),
        (
            "hbf",
            "f",
            "expected weight to be float32 or float16, as out_dtype is float32 and another tensor is of that half type",
        ),
        ("ddd", "f", "expected input to be float32, as out_dtype is float32, but got float64"),
        ("fff", "d", "expected input to be float64, as out_dtype is float64, but got float32"),
        (
            "fff",
            "i",
            "expected out_dtype to be float16, bfloat16, float32, float64, complex64 or complex128, but got int",
        ),
        ("fhf", None, "expected weight to have input's dtype float32, but got float16"),
    ],
)
def test_refused(dtypes, out_dtype, message, device):
    by_letter = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32, "d": torch.float64, "i": torch.int32}
    tensors = mixed(Problem((5,), 2, 3, 4), [by_letter[letter] for letter in dtypes], device)
    for place in (device, "meta"):
        with pytest.raises(RuntimeError, match=f"blockdiag::linear: {message}"):
            OPS.linear(*(tensor.to(place) for tensor in tensors), out_dtype=by_letter.get(out_dtype))


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_second_derivatives(half, device):
    """Of a function that is not linear in any tensor, against float64."""
    dtypes = (half, torch.float32, torch.float32)
    tensors = mixed(Problem((6,), 2, 3, 4), dtypes, device)
    vectors = [torch.randn_like(tensor) for tensor in tensors]

    def second(op, tensors, vectors):
        loss = op(*tensors).double().pow(3).mean()
        grads = torch.autograd.grad(loss, tensors, create_graph=True)
        product = sum((grad.double() * vector).sum() for grad, vector in zip(grads, vectors, strict=True))
        return torch.autograd.grad(product, tensors)

    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = second(blockdiag.linear, exact, [vector.double() for vector in vectors])
    for inside in (False, True):
        with torch.autocast(device, dtype=half, enabled=inside):
            actual = second(partial(under_autocast, device, half), tensors, vectors)
        for got, want, dtype in zip(actual, expected, dtypes, strict=True):
            assert got.dtype == dtype
            assert (got.double() - want).norm() <= 16 * torch.finfo(half).eps * want.norm()


def test_second_derivatives_of_a_float32_call_in_a_region(device):
    """Backward passes compute in the dtypes of their forward pass, whatever autocast says."""
    tensors = make(Problem((6,), 2, 3, 4), torch.float32, device)

    def second(enabled):
        output = blockdiag.linear(*tensors)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            (grad,) = torch.autograd.grad(output.pow(2).sum(), tensors[0], create_graph=True)
            return torch.autograd.grad(grad.pow(2).sum(), tensors[:2])

    torch.testing.assert_close(second(True), second(False), rtol=0, atol=0)


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_forward_mode(half, device):
    tensors = [
        tensor.detach() for tensor in mixed(Problem((6,), 2, 3, 4), (half, torch.float32, torch.float32), device)
    ]
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    output, tangent = torch.func.jvp(partial(under_autocast, device, half), tuple(tensors), tuple(tangents))
    assert output.dtype == tangent.dtype == half
    exact = torch.func.jvp(
        blockdiag.linear, tuple(t.double() for t in tensors), tuple(tangent.double() for tangent in tangents)
    )
    for got, want in zip((output, tangent), exact, strict=True):
        assert (got.double() - want).norm() <= 4 * torch.finfo(half).eps * want.norm()


@pytest.fixture
def without_kernels():
    """Libraries that do not convert."""
    before = blockdiag.backends.cpu.preferred_blas_library()
    blockdiag.backends.cpu.preferred_blas_library("aten")
    yield
    blockdiag.backends.cpu.preferred_blas_library(before)


def test_sums_of_half_tensors_beyond_their_range(without_kernels):
    """An explicit out_dtype is the dtype of the sums for every library."""
    x, weight = (torch.full(shape, 300.0, dtype=torch.float16) for shape in ((2, 4), (1, 1, 4)))
    for w in (weight, weight.float()):
        assert (OPS.linear(x, w, out_dtype=torch.float32) == 4 * 300**2).all()
    assert (OPS.linear_weight_grad(x, x, [1, 4, 4], out_dtype=torch.float32) == 2 * 300**2).all()


def test_autocast_caches_its_casts_where_nothing_converts(without_kernels):
    tensors = mixed(Problem((4,), 2, 3, 5), (torch.float32, torch.float32, torch.float32), "cpu")
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profile, torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(5):
            blockdiag.linear(*tensors)
    assert sum(event.name == "aten::_to_copy" for event in profile.events()) <= len(tensors)


@pytest.mark.parametrize(
    "problem",
    [
        Problem((600,), 3, 130, 70),
        Problem((600,), 45, 40, 40),  # blocks take turns
        Problem((30,), 2, 601, 35),  # dot products
        Problem((500,), 6, 70, 2),
        Problem((2,), 3, 300, 300),
    ],
    ids=problem_id,
)
def test_equal_bits_for_any_number_of_threads(problem, device):
    if device != "cpu":
        pytest.skip("threads of a CPU")
    tensors = mixed(problem, (torch.bfloat16, torch.float32, torch.float32), device)
    grad_output = torch.randn(problem.output_shape(False), dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        output = under_autocast(device, torch.bfloat16, *tensors)
        results.append([output, *torch.autograd.grad(output, tensors, grad_output)])
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
