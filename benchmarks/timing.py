"""Times contestants on one problem: checked first, then in turn round by round, so that a drifting machine hits all."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.contestants import CONTESTANTS

ROUND_SECONDS = 0.02  # that one contestant runs in one round, at least once
TOTAL_SECONDS = 2.0  # after which a slow contestant sits out the rest of the rounds


class Problem(NamedTuple):
    batch: int
    num_blocks: int
    in_block: int
    out_block: int

    def __str__(self) -> str:
        return f"{self.batch}, {self.num_blocks}, {self.in_block}->{self.out_block}"


def make_steps(
    names: list[str], problem: Problem, dtype: torch.dtype, device: torch.device, backward: bool
) -> dict[str, Callable[[], object]]:
    """For each contestant, a function that runs it once on the problem. All compute on the same random data.

    Raises:
        AssertionError: a contestant's output is not that of the float64 reference, to the dtype's precision.
    """
    batch, num_blocks, in_block, out_block = problem
    weight = torch.randn(num_blocks, out_block, in_block, dtype=dtype, device=device) / in_block**0.5
    bias = torch.randn(num_blocks * out_block, dtype=dtype, device=device)
    x = torch.randn(batch, num_blocks * in_block, dtype=dtype, device=device, requires_grad=backward)
    grad_output = torch.randn(batch, num_blocks * out_block, dtype=dtype, device=device)
    wide = x.detach().double().view(batch, num_blocks, in_block)
    reference = torch.einsum("bgk,gnk->bgn", wide, weight.double()).flatten(1) + bias.double()

    def make_step(name: str) -> Callable[[], object]:
        forward, parameters = CONTESTANTS[name](weight, bias)
        error = ((forward(x).double() - reference).norm() / reference.norm()).item()
        if not error < 4 * torch.finfo(dtype).eps + 1e-6:
            raise AssertionError(f"{name} is wrong on {problem} in {dtype}: relative error {error:.2g}")

        def step() -> object:
            if backward:
                return torch.autograd.grad(forward(x), [x, *parameters], grad_output)
            with torch.no_grad():
                return forward(x)

        return step

    return {name: make_step(name) for name in names}


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """A function that replays one run of `step` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def run(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Microseconds of one run, from `repeats` runs back to back."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / repeats
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    return 1e6 * (time.perf_counter() - began) / repeats


def measure(steps: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """For each step, its median over the rounds and its quartiles in microseconds, and how many rounds it ran."""
    repeats = {}
    for name, step in steps.items():
        run(step, 1, device)
        repeats[name] = max(1, int(1e6 * ROUND_SECONDS / run(step, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            if 1e-6 * repeats[name] * sum(times[name]) < TOTAL_SECONDS:
                times[name].append(run(step, repeats[name], device))
    results = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        results[name] = {"median_us": median, "low_us": low, "high_us": high, "rounds": len(values)}
    return results
