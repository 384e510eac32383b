"""A few layers forward and backward on a GPU by each library, compared with the reference: what compute-sanitizer runs.

Blocks that fill no tile, one block, one row and a bias that starts where no vector does; few and small, as each kernel
runs many times slower there. Run: PYTHONPATH=. python tests/gpu_subset.py
"""

import torch

import blockdiag
from reference import Problem, check, make

PROBLEMS = [
    Problem((128,), 4, 64, 64),
    Problem((33,), 5, 17, 9),
    Problem((7,), 16, 32, 48),
    Problem((1,), 6, 8, 4),
    Problem((19,), 1, 31, 29),
]


def run_all() -> int:
    """Returns how many layers were checked."""
    checked = 0
    for problem in PROBLEMS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            input, weight, bias = make(problem, dtype, "cuda")
            unaligned = torch.cat([bias.detach(), bias.detach()[:1]])[1:].requires_grad_()
            grad_output = torch.randn(problem.output_shape(False), dtype=dtype, device="cuda")
            for each in (None, bias, unaligned):
                check(torch.ops.blockdiag.linear, input, weight, each, grad_output)
                checked += 1
    return checked


if __name__ == "__main__":
    torch.manual_seed(0)
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    if hasattr(blockdiag, "preferred_cuda_gemm"):
        for library in ("cublas", "cublaslt", "small_blocks"):
            blockdiag.preferred_cuda_gemm(library)
            print(f"{library}: {run_all()} layers checked")
    else:
        print(f"{run_all()} layers checked")
