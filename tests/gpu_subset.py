"""A few layers, forward and backward, on a GPU with each library, against the reference: for compute-sanitizer.

Blocks smaller than a tile, one block, one row, a batch summed in parts, a bias that is not aligned to vectors, and
float32 tensors under autocast. Few and small, as kernels run many times slower there.

Run: PYTHONPATH=. python tests/gpu_subset.py [small_blocks] [cublas] [cublaslt] [fused] [tuned]
"""

import sys
from functools import partial

import torch

import blockdiag
from reference import Problem, check, make, problem_id

# Our own kernels first, the slowest last: there may be a time limit.
LIBRARIES = ("small_blocks", "cublas", "cublaslt", "fused", "tuned")
PROBLEMS = [
    Problem((128,), 4, 64, 64),
    Problem((33,), 5, 17, 9),
    Problem((7,), 16, 32, 48),
    Problem((1,), 6, 8, 4),
    Problem((19,), 1, 31, 29),
    Problem((1100,), 2, 24, 40),
]


def run_all(problems: list[Problem], dtypes: tuple[torch.dtype, ...]) -> int:
    """Returns the number of layers checked."""
    checked = 0
    for problem in problems:
        print(problem_id(problem), file=sys.stderr, flush=True)
        for dtype in dtypes:
            input, weight, bias = make(problem, dtype, "cuda")
            unaligned = torch.cat([bias.detach(), bias.detach()[:1]])[1:].requires_grad_()
            grad_output = torch.randn(problem.output_shape(False), dtype=dtype, device="cuda")
            for each in (None, bias, unaligned):
                check(torch.ops.blockdiag.linear, input, weight, each, grad_output)
                checked += 1
            if dtype != torch.float32:
                tensors = make(problem, torch.float32, "cuda")
                check(partial(under_autocast, dtype), *tensors, grad_output, dtype=dtype, rounded=dtype)
                checked += 1
    return checked


def under_autocast(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", dtype):
        return torch.ops.blockdiag.linear(*tensors)


def run_library(name: str) -> int:
    if name != "tuned":
        blockdiag.backends.cuda.preferred_blas_library(name)
        halves = (torch.float16, torch.bfloat16)
        return run_all(PROBLEMS, halves if name == "small_blocks" else (*halves, torch.float32))
    # Up to 16 algorithms per product: two layers are enough.
    blockdiag.backends.cuda.preferred_blas_library("fused")
    with blockdiag.backends.tune():
        return run_all([PROBLEMS[0], PROBLEMS[4]], (torch.float16,))


if __name__ == "__main__":
    torch.manual_seed(0)
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    for library in sys.argv[1:] or LIBRARIES:
        print(f"{library}: {run_library(library)} layers checked", flush=True)
