"""The roofline: the machine's peak and bandwidth, measured in the same run, and the time they allow a problem."""

import ctypes
import math
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

import blockdiag
from benchmarks import native
from benchmarks.suites import Problem
from benchmarks.timing import Precision, cache_bytes, run

ROUNDS = 10
SECONDS = 2.0  # no further round is started after that
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
CUDA_COPY_BYTES = 1 << 30
PEAK_ROUNDS = 100  # a neighbor on the machine may slow down the first ones
PEAK_REPEATS = 1 << 22  # of 14 or 24 instructions: some 10 ms


class Ceiling(NamedTuple):
    """What the machine does at most, for one dtype and number of threads. The floor is made of the first two.

    Attributes:
        operations_per_second: FLOP/s.
        bytes_per_second: the larger of the bandwidths. A floor has to hold for any mix of reads and writes.
        instruction_set: whose multiply-adds in registers are `operations_per_second`; None if a large GEMM's are.
        read_bytes_per_second: the bandwidth of reading; None on a GPU.
        copy_bytes_per_second: the bandwidth of a copy, read + written.
    """

    operations_per_second: float
    bytes_per_second: float
    instruction_set: str | None = None
    read_bytes_per_second: float | None = None
    copy_bytes_per_second: float | None = None


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


def instruction_set_of(dtype: torch.dtype, build_info: dict[str, str]) -> str | None:
    """The instruction set that our CPU kernels compute a dtype with, in float32 unless it multiplies pairs of bfloat16.

    None if a library computes it, perhaps with other instructions: a float64, or half types where torch has native ones
    that our kernels lack.
    """
    names = build_info["cpu_gemms"].split(", ")[::-1]  # fallbacks last
    usable = names[names.index(build_info["cpu_gemm"]) :]
    if dtype == torch.float32:
        kernels = ["avx512", "avx2"]
    elif "native_half" not in usable and dtype in (torch.bfloat16, torch.float16):
        kernels = [*(["avx512_bf16"] if dtype == torch.bfloat16 else []), "avx512", "avx2"]
    else:
        kernels = []
    return next((name for name in usable if name in kernels), None)


def multiply_adds(instruction_set: str, threads: int, repeats: int) -> tuple[float, float]:
    """Repeats fused multiply-adds in registers, in each thread. Returns the FLOPs of all, and how many seconds it took.

    Raises:
        NotImplementedError: peak.cpp does not compile here, or does not know the instruction set.
    """
    function = native.load("peak").multiply_adds
    function.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int64, ctypes.POINTER(ctypes.c_double))
    function.restype = ctypes.c_double
    seconds = ctypes.c_double()
    operations = function(instruction_set.encode(), threads, repeats, ctypes.byref(seconds))
    if operations == 0:
        raise NotImplementedError(f"peak.cpp has no multiply-adds of {instruction_set}")
    return operations, seconds.value


def peak_rate(instruction_set: str, threads: int) -> float:
    """FLOP/s of multiply_adds: the best of PEAK_ROUNDS.

    Raises:
        NotImplementedError: as there.
    """
    rounds = (multiply_adds(instruction_set, threads, PEAK_REPEATS) for _ in range(PEAK_ROUNDS))
    return max(operations / seconds for operations, seconds in rounds)


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
    """On a CPU the peak of its instruction set, or else, as on a GPU, the rate of a large GEMM; and the bandwidths.

    These are of arrays of eight times the cache, or on a GPU of CUDA_COPY_BYTES.
    """
    size = CUDA_COPY_BYTES if device.type == "cuda" else 8 * cache_bytes(device)
    source = torch.randn(size // 4, device=device)
    target = torch.ones_like(source)
    with torch.no_grad():
        copy = 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)
        if device.type == "cuda":
            return Ceiling(_gemm_rate(dtype, device), copy, copy_bytes_per_second=copy)
        read = source.nbytes / _best_seconds(source.sum, device)
        instruction_set = instruction_set_of(dtype, blockdiag.build_info())
        rate = None
        if instruction_set is not None:
            try:
                rate = peak_rate(instruction_set, torch.get_num_threads())
            except NotImplementedError as error:
                warnings.warn(f"the ceiling is the rate of a large GEMM, not the CPU's peak: {error}", stacklevel=2)
                instruction_set = None
        return Ceiling(rate or _gemm_rate(dtype, device), max(read, copy), instruction_set, read, copy)


def floor_us(problem: Problem, precision: Precision, backward: bool, ceiling: Ceiling) -> float:
    r"""The roofline's time in microseconds: max(FLOPs / rate, bytes / bandwidth).

    With B rows and G blocks K -> N, x of B G K elements, W of G N K, b of G N and y of B G N, the passes are

    - forward: reads x, W, b; writes y
    - gradient of the input: reads grad y, W; writes grad x
    - gradient of weight and bias: reads grad y, x; writes grad W, grad b

    of 2 B G K N FLOPs each. Under autocast y and grad y have autocast's dtype, and all others keep that of the tensors:
    the least traffic, of a layer that casts what it loads and stores, without passes for the casts.

    A problem that stays in the cache can beat its floor, which assumes that each operand comes from memory.
    """
    batch, num_blocks, in_block, out_block = problem
    item = precision.dtype.itemsize
    x = item * batch * num_blocks * in_block
    weight = item * num_blocks * out_block * in_block
    bias = item * num_blocks * out_block
    y = precision.result.itemsize * batch * num_blocks * out_block
    operations = 2 * batch * num_blocks * in_block * out_block
    moved = x + weight + bias + y
    if backward:
        operations *= 3
        moved += (y + weight + x) + (y + x + weight + bias)
    return 1e6 * max(operations / ceiling.operations_per_second, moved / ceiling.bytes_per_second)
