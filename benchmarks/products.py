"""Times the layer's three products one by one in float32 on a CPU: ours, and those of libxsmm where it is installed.

GFLOP/s, libxsmm's time over ours, and both as fractions of the peak of multiply-adds in registers: medians of the
rounds, the ratios within a round. Operands come from the cache if they fit, unless --rotate. Each call allocates its
result.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

import blockdiag
from benchmarks import libxsmm
from benchmarks.arguments import positive
from benchmarks.ceilings import instruction_set_of, multiply_adds
from benchmarks.report import aligned
from benchmarks.suites import Problem, make_suites
from benchmarks.timing import CASE_SECONDS, PRECISIONS, Data, cache_bytes, make_data, reference_of, time_rounds

CPU = torch.device("cpu")
PRECISION = PRECISIONS["float32"]
LIMIT = 1e-5  # of a relative error
PEAK_REPEATS = 1 << 19  # some milliseconds


def _operands(name: str, data: Data) -> list[tuple[Tensor, Tensor]]:
    """What the product multiplies, in all copies: the weight and x or grad y, or x and grad y."""
    if name == "grad weight":
        return list(zip(data.inputs, data.grad_outputs, strict=True))
    batch = data.inputs if name == "forward" else data.grad_outputs
    return [(data.weight.clone(), each) for each in batch]


def _ours(problem: Problem, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    batch, num_blocks, in_block, out_block = problem
    x_sizes, weight_sizes = [batch, num_blocks * in_block], [num_blocks, out_block, in_block]
    linear = torch.ops.blockdiag.linear.default
    input_grad = torch.ops.blockdiag.linear_input_grad.default
    weight_grad = torch.ops.blockdiag.linear_weight_grad.default
    functions = {
        "forward": lambda weight, x: linear(x, weight),
        "grad input": lambda weight, grad_output: input_grad(grad_output, weight, x_sizes),
        "grad weight": lambda x, grad_output: weight_grad(grad_output, x, weight_sizes),
    }
    return functions[name]


def _step(function: Callable[[Tensor, Tensor], Tensor], operands: list[tuple[Tensor, Tensor]]) -> Callable[[], Tensor]:
    cycle = itertools.cycle(operands)
    return lambda: function(*next(cycle))


def peak_step(threads: int) -> tuple[Callable[[], object], float] | None:
    """Multiply-adds with the instruction set of our kernels, and their FLOPs; None where it cannot be measured."""
    instruction_set = instruction_set_of(torch.float32, blockdiag.build_info())
    if instruction_set is None:
        print("No peak: no kernels of ours compute on this CPU", file=sys.stderr)
        return None
    try:
        operations, _ = multiply_adds(instruction_set, threads, PEAK_REPEATS)
    except NotImplementedError as error:
        print(f"No peak: {error}", file=sys.stderr)
        return None
    return lambda: multiply_adds(instruction_set, threads, PEAK_REPEATS), operations


def measure_product(problem: Problem, name: str, rounds: int, rotate: bool) -> dict[str, list[float]]:
    """GFLOP/s of "ours", and where they apply of "libxsmm" and "peak", in each round.

    Raises:
        AssertionError: a result is wrong.
    """
    data = make_data(problem, PRECISION, CPU, True, 2 * cache_bytes(CPU) if rotate else 0)
    data = data._replace(inputs=[x.detach() for x in data.inputs], bias=torch.zeros_like(data.bias))
    operands = _operands(name, data)
    steps = {"ours": _step(_ours(problem, name), operands)}
    if torch.get_num_threads() == 1:
        try:
            product = libxsmm.tuned_product(problem, name)
        except NotImplementedError as error:
            print(f"Without libxsmm at {problem}, {name}: {error}", file=sys.stderr)
        else:
            if name != "grad weight":
                operands = [(product.arrange(weight), batch) for weight, batch in operands]
            steps["libxsmm"] = _step(product, operands)
    wanted = reference_of(data, PRECISION, True)[libxsmm.PRODUCTS.index(name)]
    for contestant, step in steps.items():
        error = ((step() - wanted).norm() / wanted.norm()).item()
        assert error <= LIMIT, f"{contestant} is wrong on {problem}: {name} has relative error {error:.2g}"
    batch, num_blocks, in_block, out_block = problem
    operations = dict.fromkeys(steps, 2.0 * batch * num_blocks * in_block * out_block)
    peak = peak_step(torch.get_num_threads())
    if peak is not None:
        steps["peak"], operations["peak"] = peak
    times = time_rounds(steps, rounds, CASE_SECONDS["cpu"], CPU, host=False)
    return {each: [1e-3 * operations[each] / time_us for time_us in times_us] for each, times_us in times.items()}


def row(problem: Problem, name: str, rates: dict[str, list[float]]) -> list[str]:
    """A line of the table, from the GFLOP/s in each round."""

    def median(of: str, over: str | None = None) -> str:
        if not {of, over or of} <= rates.keys():
            return "-"
        if over is None:
            return f"{statistics.median(rates[of]):.1f}"
        return f"{statistics.median(one / other for one, other in zip(rates[of], rates[over], strict=False)):.2f}"

    ratios = (median("ours", "libxsmm"), median("ours", "peak"), median("libxsmm", "peak"))
    return [str(problem), name, median("ours"), median("libxsmm"), median("peak"), *ratios]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument(
        "--threads", type=positive(int), default=1, help="libxsmm runs with one only (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive(int), default=15, help="timed rounds of each product (default: %(default)s)"
    )
    parser.add_argument("--rotate", action="store_true", help="take operands from memory: exchange them between calls")
    arguments = parser.parse_args(argv)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    ratios = ("time libxsmm/ours", "ours of peak", "libxsmm of peak")
    rows = [["B, G, K->N", "product", "ours", "libxsmm", "peak", *ratios]]
    try:
        with torch.no_grad():
            for problem, name in itertools.product(make_suites("cpu")["libxsmm"].problems, libxsmm.PRODUCTS):
                rows.append(row(problem, name, measure_product(problem, name, arguments.rounds, arguments.rotate)))
    finally:
        torch.set_num_threads(threads_before)
    instruction_set = instruction_set_of(torch.float32, blockdiag.build_info())
    print(f"GFLOP/s in float32, threads: {arguments.threads}, instruction set of ours: {instruction_set}")
    print("\n".join(aligned(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
