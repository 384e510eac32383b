"""The reference: the op's definition in double precision, and the tolerances.

Shared by all tests, with the shapes and the dtypes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

import blockdiag

REAL_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*REAL_DTYPES, torch.complex64, torch.complex128]


class Tolerance(NamedTuple):
    """Unit roundoffs of one dtype: of its results, and of the accumulation."""

    result: float
    accumulation: float


# The one table of tolerances, from the error bound of a dot product of length k in any order of summation,
# |error| <= k u sum(|x||w|) (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), with u the
# unit roundoff of the accumulation, float32 for the half types, plus one rounding of the result to its dtype. Nothing
# is measured or fitted. `_SLACK` covers the four real products of a complex one, and the addition of the bias.
TOLERANCES = {
    torch.float16: Tolerance(result=2**-11, accumulation=2**-24),
    torch.bfloat16: Tolerance(result=2**-8, accumulation=2**-24),
    torch.float32: Tolerance(result=2**-24, accumulation=2**-24),
    torch.float64: Tolerance(result=2**-53, accumulation=2**-53),
    torch.complex64: Tolerance(result=2**-24, accumulation=2**-24),
    torch.complex128: Tolerance(result=2**-53, accumulation=2**-53),
}
_SLACK = 4


class Problem(NamedTuple):
    """The sizes of one layer; `batch` is the shape of the leading dimensions."""

    batch: tuple[int, ...]
    num_blocks: int
    in_block: int
    out_block: int

    def input_shape(self, stacked: bool) -> tuple[int, ...]:
        features = (self.num_blocks, self.in_block) if stacked else (self.num_blocks * self.in_block,)
        return (*self.batch, *features)

    def output_shape(self, stacked: bool) -> tuple[int, ...]:
        features = (self.num_blocks, self.out_block) if stacked else (self.num_blocks * self.out_block,)
        return (*self.batch, *features)

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        return (self.num_blocks, self.out_block, self.in_block)


PROBLEMS = [
    Problem((128,), 4, 64, 64),
    Problem((7,), 3, 5, 11),  # primes
    Problem((33,), 5, 17, 1),
    Problem((33,), 5, 1, 17),
    Problem((1,), 1, 1, 1),
    Problem((1,), 6, 8, 4),
    Problem((), 4, 6, 2),  # no leading dimensions
    Problem((2, 3, 4), 2, 9, 10),
    Problem((19,), 1, 31, 29),  # one block: a plain linear layer
    Problem((5000,), 2, 3, 4),  # a large batch
    Problem((4,), 97, 2, 3),  # many tiny blocks
    Problem((2,), 70000, 1, 2),  # more blocks than a CUDA grid's last dimension
    Problem((9,), 2, 300, 270),  # larger than a tile
    Problem((300,), 1, 70, 41),  # more rows than a tile
    Problem((2,), 2, 520, 530),  # few rows of long blocks
    Problem((3,), 1, 600, 13),  # a long sum for each half type
    Problem((21,), 2, 530, 35),  # some rows of long blocks
    Problem((300,), 2, 70, 2),  # few outputs
    Problem((300,), 3, 96, 1),
    Problem((0,), 3, 4, 5),
    Problem((2, 0, 3), 3, 4, 5),
    Problem((6,), 0, 4, 5),
    Problem((6,), 3, 0, 5),
    Problem((6,), 3, 4, 0),
    Problem((6,), 3, 0, 0),
]


def problem_id(problem: Problem) -> str:
    batch = "x".join(map(str, problem.batch)) or "none"
    return f"B{batch}-G{problem.num_blocks}-K{problem.in_block}-N{problem.out_block}"


def is_stacked(input: Tensor, weight: Tensor) -> bool:
    num_blocks, _, in_block = weight.shape
    return input.shape[-1] != num_blocks * in_block


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition, block by block: differentiable, in the dtype of its arguments."""
    num_blocks, out_block, in_block = weight.shape
    stacked = is_stacked(input, weight)
    leading = input.shape[: -2 if stacked else -1]
    blocks = input if stacked else input.reshape(*leading, num_blocks, in_block)
    output = (blocks.unsqueeze(-2) * weight).sum(-1)
    if bias is not None:
        output = output + bias.reshape(num_blocks, out_block)
    return output if stacked else output.reshape(*leading, num_blocks * out_block)


def make(problem: Problem, dtype: torch.dtype, device: str, *, stacked: bool = False, bias: str | None = "flat"):
    """Random (input, weight, bias) that require gradients; bias is "flat", "stacked" or None."""
    shapes = [problem.input_shape(stacked), problem.weight_shape]
    if bias is not None:
        shapes.append(problem.output_shape(bias == "stacked")[len(problem.batch) :])
    tensors = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]
    return (*tensors, None)[:3]


def wide_copy(tensor: Tensor | None) -> Tensor | None:
    """A detached copy in double precision on the CPU."""
    if tensor is None:
        return None
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    return tensor.detach().to("cpu", wide).requires_grad_(tensor.requires_grad)


def assert_within(
    name: str,
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    length: int,
    dtype: torch.dtype,
    rounded: torch.dtype | None = None,
    bias: Tensor | None = None,
):
    """Asserts |actual - expected| <= bound; `magnitude` is the sum of |products|, `length` their number.

    `rounded`: the dtype that operands of another one may be rounded to before they are multiplied. `bias`: may be added
    to a product that was rounded to the result's dtype.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == dtype, f"{name}: {actual.dtype}, expected {dtype}"
    if actual.numel() == 0:
        return
    tolerance = TOLERANCES[dtype]
    bound = _SLACK * (tolerance.result * expected.abs() + (length + 1) * tolerance.accumulation * magnitude)
    if rounded is not None:
        bound = bound + _SLACK * TOLERANCES[rounded].result * magnitude
        subnormal = torch.finfo(rounded).smallest_normal * torch.finfo(rounded).eps
        bound = bound + _SLACK * length * subnormal  # of a factor, beside others of about 1
    if bias is not None:
        bound = bound + _SLACK * tolerance.result * (expected - bias).abs()
    # Subnormal numbers lack relative precision.
    bound = bound + torch.finfo(dtype).smallest_normal
    error = (wide_copy(actual.detach()) - expected).abs()
    worst = int((error / bound).nan_to_num(torch.inf).argmax())
    assert (error <= bound).all(), (
        f"{name}: error {error.flatten()[worst]} exceeds {bound.flatten()[worst]} at flat index {worst}: got "
        f"{actual.flatten()[worst]}, expected {expected.flatten()[worst]}"
    )


def check(
    op,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    grad_output: Tensor | None = None,
    dtype: torch.dtype | None = None,
    rounded: torch.dtype | None = None,
) -> Tensor:
    """Runs `op` and, given a `grad_output`, its backward pass; compares all results with the reference.

    Returns the output of `op`, which is to be of `dtype`, the input's by default; `rounded` as in assert_within.
    """
    dtype = dtype or input.dtype
    given = [tensor for tensor in (input, weight, bias) if tensor is not None]
    wide = [wide_copy(tensor) for tensor in given]
    expected = linear(*wide)
    magnitude = linear(*[tensor.detach().abs() for tensor in wide])
    actual = op(*given)
    assert actual.is_contiguous()
    assert actual.device == input.device
    added = None
    if bias is not None and actual.is_cuda and dtype.itemsize == 2 and blockdiag.build_info()["cuda_gemm"] == "cublas":
        # Some kernels of cuBLAS round a half product before they add C, as for torch.baddbmm.
        added = wide[2].detach().reshape(expected.shape[-2 if is_stacked(input, weight) else -1 :])
    assert_within("output", actual, expected.detach(), magnitude, weight.shape[-1], dtype, rounded, added)
    if grad_output is not None:
        wanted = [index for index, tensor in enumerate(given) if tensor.requires_grad]
        actual_grads = torch.autograd.grad(actual, [given[i] for i in wanted], grad_output, retain_graph=True)
        expected_grads = torch.autograd.grad(expected, [wide[i] for i in wanted], wide_copy(grad_output.detach()))
        absolute = [tensor.detach().abs().requires_grad_() for tensor in wide]
        magnitudes = torch.autograd.grad(
            linear(*absolute), [absolute[i] for i in wanted], wide_copy(grad_output.detach()).abs()
        )
        batch = expected.numel() // max(weight.shape[0] * weight.shape[1], 1)
        lengths = (weight.shape[1], batch, batch)
        for i, got, want, size in zip(wanted, actual_grads, expected_grads, magnitudes, strict=True):
            name = ("grad input", "grad weight", "grad bias")[i]
            assert_within(name, got, want, size, lengths[i], given[i].dtype, rounded)
    return actual
