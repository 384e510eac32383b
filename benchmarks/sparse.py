"""Times block-sparse layers on a CPU beside dense ones and torch's sparse ones, and writes all numbers as JSON.

Each contestant is checked against float64 before it is timed; then they run in turn, round by round. The table shows
ours in microseconds, and how many times as fast it is as each other: medians of the ratios within a round.
"""

import argparse
import itertools
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import blockdiag
from benchmarks import runs
from benchmarks.__main__ import describe_environment
from benchmarks.arguments import positive
from benchmarks.report import aligned
from benchmarks.timing import CASE_SECONDS, PRECISIONS, cache_bytes, time_rounds

CPU = torch.device("cpu")
MAX_COPIES = 256
PASSES = ("fwd", "fwd+bwd")
INT8_BLOCKS = ((1, 4), (8, 1))  # what torch.ao.nn.sparse.quantized has kernels for


class SparseProblem(NamedTuple):
    batch: int
    in_features: int
    out_features: int
    out_block: int
    in_block: int
    density: float

    def __str__(self) -> str:
        size = f"{self.out_block}x{self.in_block}"
        return f"{self.batch}, {self.in_features}->{self.out_features}, {size}, {self.density:g}"


def problems() -> list[SparseProblem]:
    """The goals' first; then batches, blocks and densities at one size."""
    sizes = ((1024, 1024), (768, 3072))
    of_goals = [
        SparseProblem(batch, *size, *block, 0.1)
        for batch, size, block in itertools.product((1, 16, 128), sizes, BLOCKS)
    ]
    sweep = [
        SparseProblem(batch, *sizes[0], *block, density)
        for batch, block, density in itertools.product((1, 16, 128, 2048), BLOCKS, (0.05, 0.1, 0.2, 0.35, 0.5, 0.7))
    ]
    others = [
        SparseProblem(batch, *sizes[0], *block, 0.1)
        for batch, block in itertools.product((1, 16, 128), (*INT8_BLOCKS, (4, 4), (8, 8), (32, 32)))
    ]
    return list(dict.fromkeys(of_goals + sweep + others))


class Layer(NamedTuple):
    """A block-sparse weight in both forms, with its bias."""

    dense: Tensor
    sparse: Tensor  # of torch.sparse_bsr layout
    bias: Tensor


def make_layer(problem: SparseProblem, dtype: torch.dtype) -> Layer:
    generator = torch.Generator().manual_seed(0)
    rows, cols = problem.out_features // problem.out_block, problem.in_features // problem.in_block
    kept = torch.zeros(rows * cols, dtype=torch.bool)
    kept[torch.randperm(rows * cols, generator=generator)[: round(problem.density * rows * cols)]] = True
    mask = kept.view(rows, 1, cols, 1).expand(-1, problem.out_block, -1, problem.in_block)
    mask = mask.reshape(problem.out_features, problem.in_features)
    weight = torch.randn(problem.out_features, problem.in_features, generator=generator, dtype=dtype) * mask
    weight /= math.sqrt(max(problem.density * problem.in_features, 1))
    bias = torch.randn(problem.out_features, generator=generator, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse layouts are in beta
        return Layer(weight, weight.to_sparse_bsr((problem.out_block, problem.in_block)), bias)


# A contestant takes a layer, and returns its forward function and parameters, which can be exchanged for copies. It
# raises NotImplementedError where it does not apply.
Forward = Callable[..., Tensor]


def ours(layer: Layer, problem: SparseProblem) -> tuple[Forward, list[Tensor]]:
    indices = [index.int() for index in (layer.sparse.crow_indices(), layer.sparse.col_indices())]
    return lambda x, v, b, *i: blockdiag.sparse_linear(x, v, *i, b), [layer.sparse.values(), layer.bias, *indices]


def dense(layer: Layer, problem: SparseProblem) -> tuple[Forward, list[Tensor]]:
    return F.linear, [layer.dense, layer.bias]


def ours_dense(layer: Layer, problem: SparseProblem) -> tuple[Forward, list[Tensor]]:
    """Our kernels for one dense block."""
    return blockdiag.linear, [layer.dense.unsqueeze(0), layer.bias]


def bsr(layer: Layer, problem: SparseProblem) -> tuple[Forward, list[Tensor]]:
    if problem.out_block != problem.in_block:
        raise NotImplementedError("square blocks only")
    return F.linear, [layer.sparse, layer.bias]


def csr(layer: Layer, problem: SparseProblem) -> tuple[Forward, list[Tensor]]:
    return F.linear, [layer.dense.to_sparse_csr(), layer.bias]


def int8(layer: Layer, problem: SparseProblem) -> tuple[Forward, list[Tensor]]:
    """torch.ao.nn.sparse.quantized: int8 weights, and activations that are quantized in each call."""
    block = (problem.out_block, problem.in_block)
    if block not in INT8_BLOCKS or layer.dense.dtype != torch.float32:
        raise NotImplementedError(f"float32 in blocks of {INT8_BLOCKS} only")
    from torch.ao.nn.sparse.quantized.dynamic import Linear
    from torch.ao.quantization import default_dynamic_qconfig

    torch.backends.quantized.engine = "qnnpack"
    linear: Any = nn.Linear(problem.in_features, problem.out_features)
    with torch.no_grad():
        linear.weight.copy_(layer.dense)
        linear.bias.copy_(layer.bias)
    linear.qconfig, linear.sparse_params = default_dynamic_qconfig, {"sparse_block_shape": block}
    quantized = Linear.from_float(linear)
    return lambda x, bias: quantized(x), [layer.bias]


CONTESTANTS = {function.__name__: function for function in (ours, dense, ours_dense, bsr, csr, int8)}
TRAINED = ("ours", "dense", "ours_dense")


def _check(name: str, output: Tensor, layer: Layer, x: Tensor) -> None:
    wanted = x.double() @ layer.dense.double().mT + layer.bias.double()
    error = ((output.double() - wanted).norm() / wanted.norm()).item()
    limit = 0.05 if name == "int8" else 4 * torch.finfo(x.dtype).eps * math.sqrt(x.shape[-1])
    assert error <= limit, f"{name} is wrong: relative error {error:.2g}"


def measure(problem: SparseProblem, which: str, dtype: torch.dtype, rotate: bool, rounds: int) -> dict[str, Any]:
    """Microseconds of one run in each round, by contestant; or why it does not apply.

    `rotate`: exchange weights for copies between runs, which together are twice as large as the cache.
    """
    layer = make_layer(problem, dtype)
    x = torch.randn(problem.batch, problem.in_features, dtype=dtype)
    grad_output = torch.randn(problem.batch, problem.out_features, dtype=dtype)
    backward = which == "fwd+bwd"
    results: dict[str, Any] = {}
    steps = {}
    for name, contestant in CONTESTANTS.items():
        try:
            if backward and name not in TRAINED:
                raise NotImplementedError("inference only")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                forward, parameters = contestant(layer, problem)
                with torch.no_grad():
                    _check(name, forward(x, *parameters), layer, x)
        except (NotImplementedError, RuntimeError) as error:
            results[name] = {"skipped": str(error).splitlines()[0][:160]}
            continue
        steps[name] = _step(forward, parameters, x, grad_output if backward else None, rotate)
    with torch.set_grad_enabled(backward):
        for name, times in time_rounds(steps, rounds, CASE_SECONDS["cpu"], CPU, host=False).items():
            results[name] = {"times_us": runs.round_times(times)}
    return results


def _step(
    forward: Forward, parameters: list[Tensor], x: Tensor, grad_output: Tensor | None, rotate: bool
) -> Callable[[], Any]:
    size = sum((p if p.layout == torch.strided else p.values()).nbytes for p in parameters)
    copies = min(MAX_COPIES, math.ceil(2 * cache_bytes(CPU) / size)) if rotate else 1
    own = [[p.detach().clone() for p in parameters] for _ in range(copies)]
    x = x.clone().requires_grad_(grad_output is not None)
    for p in itertools.chain(*own):
        p.requires_grad_(grad_output is not None and p.is_floating_point())
    cycle = itertools.cycle(own)
    if grad_output is None:
        return lambda: forward(x, *next(cycle))

    def train() -> Any:
        arguments = [x, *next(cycle)]
        output = forward(*arguments)
        return torch.autograd.grad(output, [a for a in arguments if a.requires_grad], grad_output)

    return train


def speedup(case: dict[str, Any], over: str) -> float | None:
    """How many times as fast ours is: the median of the ratios within a round."""
    times = runs.times_of(case)
    return runs.speedup(case, "ours", over) if {"ours", over} <= times.keys() else None


def table(content: dict[str, Any]) -> Iterator[str]:
    others = [name for name in CONTESTANTS if name != "ours"]
    settings = list(dict.fromkeys((c["pass"], c["rotate"], c["threads"], c["precision"]) for c in content["cases"]))
    for which, rotate, threads, precision in settings:
        yield f"{precision}, {which}, weights {'from memory' if rotate else 'in the cache'}, threads: {threads}"
        rows = [["batch, K->N, block, density", "ours, us", *(f"over {name}" for name in others)]]
        for case in content["cases"]:
            if (case["pass"], case["rotate"], case["threads"], case["precision"]) != (
                which,
                rotate,
                threads,
                precision,
            ):
                continue
            ratios = [speedup(case, name) for name in others]
            median = runs.median_us(case, "ours")
            problem = str(SparseProblem(**case["problem"]))
            rows.append([problem, f"{median:.1f}", *("-" if r is None else f"{r:.2f}" for r in ratios)])
        yield "\n".join(aligned(rows)) + "\n"


class Goal(NamedTuple):
    """The least speedup over a contestant at density 0.1, for one thread in float32."""

    what: str
    which: str
    rotate: bool
    batches: tuple[int, ...]
    blocks: tuple[tuple[int, int], ...]
    over: str
    least: float


FINE = ((16, 1), (16, 4))
BLOCKS = (*FINE, (16, 16))
GOALS = [
    Goal("batch 1 in the cache, over dense", "fwd", False, (1,), FINE, "dense", 4),
    Goal("batch 1 from memory, over dense", "fwd", True, (1,), FINE, "dense", 7),
    Goal("batch 16 and 128, over our dense", "fwd", False, (16, 128), BLOCKS, "ours_dense", 6),
    Goal("batch 16 and 128, over dense", "fwd", False, (16, 128), BLOCKS, "dense", 12),
    Goal("batch 16 and 128, over BSR", "fwd", False, (16, 128), BLOCKS, "bsr", 15),
    Goal("forward + backward, batch 128, over dense", "fwd+bwd", False, (128,), BLOCKS, "dense", 5),
]


def goals(content: dict[str, Any]) -> str:
    rows = [["at density 0.1", "goal", "lowest", "mean", "at"]]
    for goal in GOALS:
        found = {}
        for case in content["cases"]:
            problem, setting = SparseProblem(**case["problem"]), (case["pass"], case["rotate"])
            fits = setting == (goal.which, goal.rotate) and (case["threads"], case["precision"]) == (1, "float32")
            shape = (problem.out_block, problem.in_block)
            if fits and problem.density == 0.1 and problem.batch in goal.batches and shape in goal.blocks:
                ratio = speedup(case, goal.over)
                if ratio is not None:
                    found[str(problem)] = ratio
        if found:
            lowest = min(found, key=lambda name: found[name])
            mean = statistics.geometric_mean(found.values())
            rows.append([goal.what, f"{goal.least:g}", f"{found[lowest]:.2f}", f"{mean:.2f}", lowest])
    return "\n".join(aligned(rows))


def plot(content: dict[str, Any], path: Path) -> None:
    """Speedup over dense against density: a panel for each batch, a line for each block of 16 outputs."""
    from matplotlib import pyplot as plt

    cases = [c for c in content["cases"] if c["pass"] == "fwd" and not c["rotate"] and c["precision"] == "float32"]
    cases = [c for c in cases if (c["problem"]["in_features"], c["problem"]["out_features"]) == (1024, 1024)]
    batches = sorted({c["problem"]["batch"] for c in cases})
    figure, panels = plt.subplots(1, len(batches), figsize=(9, 3.2), sharey=True, squeeze=False, layout="constrained")
    for batch, axes in zip(batches, panels[0], strict=True):
        for block, color in zip(BLOCKS, ("#0072b2", "#d55e00", "#009e73"), strict=True):
            for over, style in (("dense", "-"), ("ours_dense", ":")):
                points = {}
                for case in cases:
                    problem, ratio = SparseProblem(**case["problem"]), speedup(case, over)
                    if (problem.batch, *problem[3:5]) == (batch, *block) and ratio is not None:
                        points[problem.density] = ratio
                label = f"{block[0]}x{block[1]} over {'F.linear' if over == 'dense' else 'our dense kernel'}"
                axes.plot(*zip(*sorted(points.items()), strict=True), style, color=color, label=label, marker=".")
        axes.axhline(1, color="0.7", linewidth=1, zorder=0)
        axes.set(xscale="log", yscale="log", title=f"batch {batch}", xlabel="density")
        ticks = [0.05, 0.1, 0.2, 0.5]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("times as fast, 1024 -> 1024")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    add = parser.add_argument
    add("--precisions", nargs="+", choices=("float32", "bfloat16", "float16"), default=["float32"])
    add("--passes", nargs="+", choices=PASSES, default=PASSES, help="default: both")
    add("--threads", type=positive(int), default=1, help="default: %(default)s")
    add("--rounds", type=positive(int), default=9, help="timed rounds of each case (default: %(default)s)")
    add("--density", type=float, nargs="+", help="only problems of these densities")
    add("--output", type=Path, metavar="JSON", help="where to write all numbers")
    add("--show", type=Path, metavar="JSON", help="measure nothing, show this")
    add("--plot", type=Path, metavar="PNG", help="plot the speedup against the density")
    arguments = parser.parse_args(argv)
    if arguments.show:
        content = runs.load(arguments.show)
    else:
        given = sys.argv[1:] if argv is None else argv
        content = {
            "environment": describe_environment("cpu"),
            "settings": {"rounds": arguments.rounds, "arguments": given},
            "ceilings": [],
            "cases": [],
            "left_out": [],
        }
        chosen = [p for p in problems() if not arguments.density or p.density in arguments.density]
        plans = [
            (precision, which, problem, rotate)
            for precision, which, problem in itertools.product(arguments.precisions, arguments.passes, chosen)
            for rotate in ((False, True) if problem.batch == 1 and which == "fwd" else (False,))
            if which == "fwd" or problem.batch >= 16
        ]
        threads_before = torch.get_num_threads()
        torch.set_num_threads(arguments.threads)
        try:
            for precision, which, problem, rotate in tqdm(plans, unit="case"):
                contestants = measure(problem, which, PRECISIONS[precision].dtype, rotate, arguments.rounds)
                setting = {"precision": precision, "pass": which, "rotate": rotate, "threads": arguments.threads}
                case = {"suite": "sparse", "problem": problem._asdict(), **setting, "contestants": contestants}
                content["cases"].append(case)
        finally:
            torch.set_num_threads(threads_before)
            if arguments.output:
                runs.save(content, arguments.output)
    print("\n".join(table(content)))
    print(goals(content))
    if arguments.plot:
        plot(content, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
