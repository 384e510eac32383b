"""Times contestants on one problem: checks them first, then runs them in turn, so that drift affects all alike."""

import itertools
import math
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contestants import OURS, Forward, context_of, make_contestant
from benchmarks.suites import Problem

# By device: GPU time is scarce, and the clock behind its events is precise.
ROUND_SECONDS = {"cpu": 0.01, "cuda": 0.003}  # for which a contestant runs in each round, at least once
# A slow contestant skips further rounds after this, or after the time of 4 runs of ours, if longer.
CASE_SECONDS = {"cpu": 1.5, "cuda": 0.15}
RUN_SECONDS = 30.0  # a contestant is left out if one run takes longer
MAX_COPIES = 64  # of the operands
HOST_CALLS = 20  # timed without waiting for the GPU; few enough to fit into its queue

Step = Callable[[], Any]


class Precision(NamedTuple):
    """The dtype of the tensors, and autocast's dtype, if it is on."""

    dtype: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def result(self) -> torch.dtype:
        return self.autocast or self.dtype


PRECISIONS = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    "amp-bfloat16": Precision(torch.float32, torch.bfloat16),
    "amp-float16": Precision(torch.float32, torch.float16),
}


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache; 32 MiB if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [re.fullmatch(r"(\d+)([KMG])", path.read_text().strip()) for path in sizes]
    return max((int(size[1]) * units[size[2]] for size in found if size), default=32 << 20)


class Data(NamedTuple):
    """Random x (B, G * K), weight (G, N, K), bias (G * N,) and grad_output (B, G * N); x and grad_output in copies."""

    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor
    grad_outputs: list[Tensor]


def make_data(problem: Problem, precision: Precision, device: torch.device, backward: bool, rotated_bytes: int) -> Data:
    batch, num_blocks, in_block, out_block = problem
    dtype = precision.dtype
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    weight = randn(num_blocks, out_block, in_block) / in_block**0.5
    bias = randn(num_blocks * out_block)
    x = randn(batch, num_blocks * in_block)
    grad_output = randn(batch, num_blocks * out_block).to(precision.result)
    size = x.nbytes + weight.nbytes + bias.nbytes + (grad_output.nbytes if backward else 0)
    copies = min(MAX_COPIES, max(1, math.ceil(rotated_bytes / size)))
    inputs = [x.clone().requires_grad_(backward) for _ in range(copies)]
    return Data(inputs, weight, bias, [grad_output.clone() for _ in range(copies if backward else 1)])


def reference_of(data: Data, precision: Precision, backward: bool) -> tuple[Tensor, ...]:
    """The output and, for `backward`, the gradients of x, weight and bias, computed in float64 on the device.

    Returned in float32, which is precise enough for a comparison, unless the tensors are float64 themselves.
    """
    wide = torch.promote_types(precision.dtype, torch.float32)
    weight = data.weight.double()
    num_blocks = len(weight)
    x, grad_output = (
        tensor.detach().double().view(len(tensor), num_blocks, -1).transpose(0, 1)
        for tensor in (data.inputs[0], data.grad_outputs[0])
    )
    results = [(x @ weight.mT).transpose(0, 1).flatten(1) + data.bias.double()]
    if backward:
        grad_x = (grad_output @ weight).transpose(0, 1).flatten(1)
        results += [grad_x, grad_output.mT @ x, grad_output.sum(1).flatten()]
    return tuple(result.to(wide) for result in results)


def _check(
    name: str, results: tuple[Tensor, ...], reference: tuple[Tensor, ...], problem: Problem, precision: Precision
) -> None:
    """Compares (output,) or (output, gradient of x, gradients of the parameters) with the reference.

    Raises:
        AssertionError: a result is off by more than the precision explains.
    """
    output, *grads = reference
    expected = [output]
    if grads:
        # A contestant's gradients have the form of its parameters.
        expected += [grads[0], *make_contestant(name, *grads[1:])[1]]
    length = max(problem.batch, problem.in_block, problem.out_block)  # of the longest dot product
    limit = 4 * torch.finfo(precision.result).eps + length**0.5 * torch.finfo(output.dtype).eps
    for index, (actual, wanted) in enumerate(zip(results, expected, strict=True)):
        what = "its output" if index == 0 else f"gradient {index - 1}"
        where = f"{name} is wrong on {problem} in {precision.result}: {what}"
        assert actual.shape == wanted.shape, f"{where} has shape {tuple(actual.shape)}, not {tuple(wanted.shape)}"
        dtype = precision.result if index == 0 else precision.dtype
        assert actual.dtype == dtype, f"{where} is of {actual.dtype}"
        # Only `dense` has gradients off the blocks. They are not part of the layer, and are not compared.
        difference = torch.where(wanted == 0, 0, actual.detach() - wanted)
        error = (difference.norm() / wanted.norm()).item()
        assert error <= limit, f"{where} has relative error {error:.2g}, the limit is {limit:.2g}"


def _make_step(
    forward: Forward, parameters: list[Tensor], data: Data, precision: Precision, rotated_bytes: int
) -> Step:
    """A function that runs the contestant once, on the next copy of the operands.

    It returns (output,), or, if the input requires gradients, (output, gradient of x, gradients of the parameters).
    """
    backward = data.inputs[0].requires_grad
    # Those of the dense contestants are large: make no more copies than necessary.
    size = sum((each.values() if each.layout == torch.sparse_bsr else each).nbytes for each in parameters)
    copies = min(len(data.inputs), math.ceil(rotated_bytes / size) if size else 1) or 1
    rotated = [[each.detach().clone().requires_grad_(backward) for each in parameters] for _ in range(copies)]
    grad_outputs = itertools.cycle(data.grad_outputs)
    calls = itertools.cycle([(x, *own) for x, own in zip(data.inputs, itertools.cycle(rotated), strict=False)])

    def call(arguments: tuple[Tensor, ...]) -> Tensor:
        if precision.autocast is None:
            return forward(*arguments)
        with torch.autocast(arguments[0].device.type, precision.autocast):
            return forward(*arguments)

    def step_forward() -> tuple[Tensor, ...]:
        return (call(next(calls)),)

    def step_backward() -> tuple[Tensor, ...]:
        arguments = next(calls)
        output = call(arguments)
        return (output, *torch.autograd.grad(output, arguments, next(grad_outputs)))

    return step_backward if backward else step_forward


class _Replay(NamedTuple):
    """Replays a graph, and keeps the operands alive, which the captured function holds."""

    graph: torch.cuda.CUDAGraph
    captured: Step

    def __call__(self) -> None:
        self.graph.replay()


def _capture(step: Step, copies: int) -> tuple[Step, Any]:
    """Captures one run of `step` per copy of the operands as a CUDA graph; returns its replay, and the last results."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        step()  # allocates what each stream has its own of, such as cuBLAS's workspace
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(copies):
                results = step()
    finally:
        torch.cuda.set_stream(current)  # a failed capture leaves its own stream current
    graph.replay()
    return _Replay(graph, step), results


class FirstRun(NamedTuple):
    """The results of a step, how long it takes, and the peak of the bytes that torch allocates in it."""

    results: Any
    seconds: float
    peak_bytes: int


def first_run(step: Step, device: torch.device, count_workspace: bool = False) -> FirstRun:
    """The first run; on a GPU the second, as one before it loads the kernels.

    `count_workspace`: include ATen's workspace for cuBLAS, by having it allocated again. There is one per thread, and
    autograd's own thread is turned off for this.
    """
    if device.type == "cuda":
        with torch.autograd.set_multithreading_enabled(not count_workspace):
            step()
            if count_workspace:
                torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before, began = torch.cuda.memory_allocated(), time.perf_counter()
            results = step()
            torch.cuda.synchronize()
            return FirstRun(results, time.perf_counter() - began, torch.cuda.max_memory_allocated() - before)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        began = time.perf_counter()
        results = step()
        seconds = time.perf_counter() - began
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = itertools.accumulate((change for _, change in changes), initial=0)
    return FirstRun(results, seconds, max(held))


def _host_run(step: Step, repeats: int) -> float:
    """Microseconds that the host needs for one run, without waiting for the GPU."""
    bursts, seconds = math.ceil(repeats / HOST_CALLS), 0.0
    for _ in range(bursts):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(HOST_CALLS):
            step()
        seconds += time.perf_counter() - began
    return 1e6 * seconds / (bursts * HOST_CALLS)


def run(step: Step, repeats: int, device: torch.device, host: bool = False) -> float:
    """Microseconds of one run, from `repeats` runs back to back."""
    if device.type == "cuda":
        if host:
            return _host_run(step, repeats)
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


def _refuse_endless(forward: Forward, parameters: list[Tensor], data: Data, problem: Problem) -> None:
    """Raises for what would take minutes, by timing a sixteenth of the batch: a large dense layer in half precision."""
    x = data.inputs[0].detach()
    dense_operations = 2 * problem.batch * problem.num_blocks**2 * problem.in_block * problem.out_block
    if dense_operations < 1e10 or x.is_cuda:
        return
    part = x[: math.ceil(problem.batch / 16)]
    passes = 3 if data.inputs[0].requires_grad else 1
    with torch.no_grad():
        seconds = 1e-6 * run(lambda: forward(part, *parameters), 1, x.device) * len(x) / len(part) * passes
    if seconds > RUN_SECONDS:
        raise NotImplementedError(f"one run takes more than {RUN_SECONDS:.0f} s")


def measure(
    names: list[str],
    problem: Problem,
    precision: Precision,
    device: torch.device,
    *,
    backward: bool = False,
    mode: str = "eager",
    rounds: int = 15,
    rotate: bool = True,
    host: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times contestants on one problem.

    Args:
        names: of the contestants.
        problem: the sizes.
        precision: dtype of the tensors, and of autocast.
        device: CPU or CUDA; the latter must be the current device.
        backward: forward and backward pass, with gradients of x and all parameters; otherwise forward without autograd.
        mode: "eager", "compiled" (torch.compile) or "graph" (replays of a CUDA graph).
        rounds: in each, every contestant runs for ROUND_SECONDS, or once, in random order.
        rotate: exchange the operands for copies between runs, which together are twice as large as the cache.
        host: on a GPU, measure the host's time, without waiting for the GPU.

    Returns:
        For each contestant, {"times_us", "peak_bytes"}: microseconds of one run in each round, of fewer rounds after
        CASE_SECONDS, and the peak of the bytes that torch held beyond the operands, in eager mode with cuBLAS's
        workspace. Or {"skipped": why it does not apply, or how it is wrong}. Or for ours {"failed": how it is wrong, or
        its error}, except for a lack of memory.
    """
    rotated_bytes = 2 * cache_bytes(device) if rotate else 0
    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    case_seconds = CASE_SECONDS[device.type]
    if mode == "compiled":
        torch.compiler.reset()  # torch.compile gives up after 8 versions of a function
    with torch.set_grad_enabled(backward):
        data = make_data(problem, precision, device, backward, rotated_bytes)
        reference = reference_of(data, precision, backward)
        copies = len(data.inputs)
        for name in names:
            try:
                with context_of(name):
                    forward, parameters = make_contestant(name, data.weight, data.bias)
                    _refuse_endless(forward, parameters, data, problem)
                    if mode == "compiled":
                        forward = torch.compile(forward, dynamic=False)
                    step = _make_step(forward, parameters, data, precision, rotated_bytes)
                    del forward, parameters  # the step holds copies
                    if mode == "compiled":
                        step()
                    # A captured graph holds the workspace, so none may be freed while there is one.
                    first = first_run(step, device, count_workspace=mode == "eager")
                    _check(name, first.results, reference, problem, precision)
                    seconds, peak_bytes = first.seconds, first.peak_bytes
                    del first  # an autograd graph of this stream that is still alive breaks a capture
                    if name == "ours":
                        case_seconds = max(case_seconds, 4 * seconds)
                    # A contestant that is this slow runs only once: its first run is as good as any.
                    if seconds < case_seconds:
                        steps[name] = step
                        if mode == "graph":
                            steps[name], replayed = _capture(step, copies)
                            _check(name, replayed, reference, problem, precision)
                            del replayed
                    results[name] = {"times_us": [1e6 * seconds], "peak_bytes": peak_bytes}
            except Exception as error:  # any kind, as other libraries' compilers raise their own
                # A variant may be missing, for example in a build without CUDA.
                excused = (torch.OutOfMemoryError, *([NotImplementedError] if name != "ours" else []))
                failed = name in OURS and not isinstance(error, excused)
                results[name] = {"failed" if failed else "skipped": _reason(error)}
                steps.pop(name, None)
        runs = copies if mode == "graph" else 1  # per call of a step
        for name, times in time_rounds(steps, rounds, case_seconds, device, host).items():
            results[name]["times_us"] = [time_us / runs for time_us in times]
    return results


def _reason(error: Exception) -> str:
    message = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    return kind + message[0][:160]


def time_rounds(
    steps: dict[str, Step], rounds: int, case_seconds: float, device: torch.device, host: bool
) -> dict[str, list[float]]:
    """Microseconds of one call of each step, round by round."""
    repeats, round_us = {}, 1e6 * ROUND_SECONDS[device.type]

    def timed(name: str, repeats: int) -> float:
        with context_of(name):
            return run(steps[name], repeats, device, host)

    for name in steps:
        once = timed(name, 1)
        repeats[name] = max(1, int(round_us / timed(name, max(1, int(0.1 * round_us / once)))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if 1e-6 * repeats[name] * sum(times[name]) < case_seconds:
                times[name].append(timed(name, repeats[name]))
    return times
