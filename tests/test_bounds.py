"""The CPU kernels touch no memory beyond their operands, which end at a guard page."""

import ctypes
import mmap

import pytest
import torch

import reference

libc = ctypes.CDLL(None, use_errno=True)


def at_the_end_of_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is followed by a guard page, which stays inaccessible."""
    size = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return flat.view(tensor.shape).copy_(tensor)


PROBLEMS = [problem for problem in reference.PROBLEMS if 0 not in (*problem.batch, *problem[1:])]


@pytest.mark.parametrize("dtype", reference.REAL_DTYPES, ids=str)
@pytest.mark.parametrize("problem", PROBLEMS, ids=reference.problem_id)
def test_nothing_is_read_beyond_the_operands(problem, dtype):
    operands = [at_the_end_of_memory(tensor.detach()) for tensor in reference.make(problem, dtype, "cpu")]
    grad_output = at_the_end_of_memory(torch.randn(problem.output_shape(stacked=False), dtype=dtype))
    reference.check(torch.ops.blockdiag.linear, *(operand.requires_grad_() for operand in operands), grad_output)
