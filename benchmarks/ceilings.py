"""The roofline: the machine's GEMM rate and bandwidth, measured in the same run, and the time they allow a problem."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import blockdiag
from benchmarks.suites import Problem
from benchmarks.timing import Precision, cache_bytes, run

ROUNDS = 10
SECONDS = 2.0  # no further round is started after that
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
CUDA_COPY_BYTES = 1 << 30


class Ceiling(NamedTuple):
    """For one dtype and number of threads: the GEMM rate in FLOP/s, and the bandwidth of a copy, read + written."""

    operations_per_second: float
    bytes_per_second: float


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The shortest of up to ROUNDS runs. On a GPU after a warm-up, each of several calls, to hide launches."""
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
    """FLOP/s of the best among torch's products of two square matrices and ours with one block.

    In float32 on a GPU without TF32, unless torch.backends allows it, like the contestants.
    """

    def products(size: int) -> list[Callable[[], object]]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        functions = [lambda: torch.mm(left, right), lambda: blockdiag.linear(left, right.unsqueeze(0))]
        if device.type == "cuda":  # the layout of a weight's gradient has other kernels
            functions.append(lambda: torch.mm(left.mT, right))
        return functions

    size = MATRIX_SIZE[device.type]
    # Small matrices first: on some CPUs torch takes a minute for a product of half types, which is no ceiling then.
    hints = [_best_seconds(function, device) for function in products(size // 8)]
    contenders = [function for function, hint in zip(products(size), hints, strict=True) if hint <= 4 * min(hints)]
    return 2 * size**3 / min(_best_seconds(function, device) for function in contenders)


def measure_ceiling(dtype: torch.dtype, device: torch.device) -> Ceiling:
    """The rates of a large GEMM, and of a copy: of eight times the cache, or on a GPU of CUDA_COPY_BYTES."""
    size = CUDA_COPY_BYTES if device.type == "cuda" else 8 * cache_bytes(device)
    source = torch.randn(size // 4, device=device)
    target = torch.ones_like(source)
    with torch.no_grad():
        copy = _best_seconds(lambda: target.copy_(source), device)
        return Ceiling(_gemm_rate(dtype, device), 2 * source.nbytes / copy)


def floor_us(problem: Problem, precision: Precision, backward: bool, ceiling: Ceiling) -> float:
    r"""The roofline's time in microseconds: max(FLOPs / rate, bytes / bandwidth).

    With B rows and G blocks K -> N, x of B G K elements, W of G N K, b of G N and y of B G N, the passes are

    - forward: reads x, W, b; writes y
    - gradient of the input: reads grad y, W; writes grad x
    - gradient of weight and bias: reads grad y, x; writes grad W, grad b

    of 2 B G K N FLOPs each. Under autocast all of these have autocast's dtype, and the casts are additional passes, as
    every contestant casts in every call: they read x, W and b in the tensors' dtype and write them in autocast's, and
    back for the gradients. (Autocast caches cast weights as long as its context lives: one call here, one step in
    training.)

    A problem that stays in the cache can beat its floor, which assumes that each operand comes from memory.
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
