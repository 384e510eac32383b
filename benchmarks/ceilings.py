"""What the machine can do at best, measured in the same run, and the least time that this leaves a problem."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import blockdiag
from benchmarks.suites import Problem
from benchmarks.timing import Precision, cache_bytes, run

ROUNDS = 10
SECONDS = 2.0  # after which no further round is started
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
CUDA_COPY_BYTES = 1 << 30


class Ceiling(NamedTuple):
    """Of one dtype and number of threads: the GEMM rate, and the bandwidth of a copy, read + written."""

    operations_per_second: float
    bytes_per_second: float


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of up to ROUNDS runs; on a GPU once warm, and of several back to back, which hide their launches."""
    repeats = 1
    if device.type == "cuda":
        function()
        repeats = 5
    began, best = time.perf_counter(), math.inf
    for _ in range(ROUNDS):
        best = min(best, 1e-6 * run(function, repeats, device))
        if time.perf_counter() - began > SECONDS:
            break
    return best


def _gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of the best of torch's products of two square matrices and of ours with one block.

    In float32 on a GPU without TF32, unless torch.backends allows it: as the contestants compute.
    """

    def products(size: int) -> list[Callable[[], object]]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions = [lambda: torch.mm(left, right), lambda: blockdiag.linear(left, right.unsqueeze(0))]
        if device.type == "cuda":  # layouts have kernels of their own: those of a gradient of the weight
            functions.append(lambda: torch.mm(left.mT, right))
        return functions

    size = MATRIX_SIZE[device.type]
    # Small matrices first: torch's product of halves takes a minute on some CPUs, and is not the ceiling then.
    hints = [_best_seconds(function, device) for function in products(size // 8)]
    contenders = [function for function, hint in zip(products(size), hints, strict=True) if hint <= 4 * min(hints)]
    return 2 * size**3 / min(_best_seconds(function, device) for function in contenders)


def measure_ceiling(dtype: torch.dtype, device: torch.device) -> Ceiling:
    """The rate of a large GEMM, and that of a copy eight times as large as the cache, on a GPU of CUDA_COPY_BYTES."""
    size = CUDA_COPY_BYTES if device.type == "cuda" else 8 * cache_bytes(device)
    source = torch.randn(size // 4, device=device)
    target = torch.ones_like(source)
    with torch.no_grad():
        copy = _best_seconds(lambda: target.copy_(source), device)
        return Ceiling(_gemm_rate(dtype, device), 2 * source.nbytes / copy)


def floor_us(problem: Problem, precision: Precision, backward: bool, ceiling: Ceiling) -> float:
    r"""The least time in microseconds: max(operations / rate, bytes / bandwidth).

    With B rows and G blocks K -> N, x of B G K elements, W of G N K, b of G N and y of B G N, the passes are

    - forward: reads x, W, b; writes y
    - gradient of the input: reads grad y, W; writes grad x
    - gradient of weight and bias: reads grad y, x; writes grad W, grad b

    of 2 B G K N operations each. Under autocast all of these have the dtype that it computes in, and the casts are
    passes of their own, as every contestant has them in every call: they read x, W and b in the dtype of the tensors
    and write them in that of autocast, and back for the gradients. (Autocast's cache of cast weights lives as long as
    its context, which is one call here, as it is one step in training.)

    A problem that stays in the cache can be faster than its floor, which has each operand come from memory.
    """
    batch, num_blocks, in_block, out_block = problem
    item, result_item = precision.dtype.itemsize, precision.result.itemsize
    x = batch * num_blocks * in_block
    weight = num_blocks * out_block * in_block
    bias = num_blocks * out_block
    y = batch * num_blocks * out_block
    operations = 2 * batch * num_blocks * in_block * out_block
    moved = result_item * (x + weight + bias + y)
    if backward:
        operations *= 3
        moved += result_item * ((y + weight + x) + (y + x + weight + bias))
    if precision.autocast is not None:
        moved += (item + result_item) * (x + weight + bias) * (2 if backward else 1)
    return 1e6 * max(operations / ceiling.operations_per_second, moved / ceiling.bytes_per_second)
