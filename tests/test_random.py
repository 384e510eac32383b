"""Random shapes, strides and dtypes, beyond the other tests' tables."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reference import DTYPES, Problem, check

sizes = st.integers(0, 9)
problems = st.builds(Problem, st.lists(st.integers(0, 5), max_size=3).map(tuple), sizes, sizes, sizes)


@st.composite
def strided(draw, shape, dtype, device):
    """A random tensor of this shape: a permuted, stepped, offset or expanded view of a larger buffer."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2])) for _ in shape]
    pads = [draw(st.sampled_from([0, 0, 3])) for _ in shape]
    expands = [draw(st.integers(0, 9)) == 0 for _ in shape]
    held = [1 if expand else size for size, expand in zip(shape, expands, strict=True)]
    buffer_shape = [held[dim] * steps[dim] + pads[dim] for dim in order]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    buffer = torch.randn(buffer_shape, dtype=dtype, generator=generator).to(device)
    view = buffer.permute([order.index(dim) for dim in range(len(shape))])
    for dim, size in enumerate(held):
        view = view.narrow(dim, pads[dim], size * steps[dim])
        view = view[(slice(None),) * dim + (slice(None, None, steps[dim]),)]
    return view.expand(shape)


# The fixture `device` is only a name, and equal for all examples.
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), problem=problems, stacked=st.booleans(), bias=st.sampled_from([None, False, True]))
def test_random_problems(data, problem, stacked, bias, device):
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    if problem.num_blocks * problem.in_block == problem.in_block:
        stacked = False  # if both layouts fit, the op reads the input as concatenated
    input = data.draw(strided(problem.input_shape(stacked), dtype, device), label="input")
    weight = data.draw(strided(problem.weight_shape, dtype, device), label="weight")
    arguments = [input, weight]
    if bias is not None:
        shape = problem.output_shape(bias)[len(problem.batch) :]
        arguments.append(data.draw(strided(shape, dtype, device), label="bias"))
    grad_output = data.draw(strided(problem.output_shape(stacked), dtype, device), label="grad_output")
    arguments = [tensor.requires_grad_() for tensor in arguments]
    check(torch.ops.blockdiag.linear, *arguments, grad_output=grad_output)
