"""Times the layer's three products one by one in float32 on a CPU: ours, and those of libxsmm where it is installed.

GFLOP/s by the median time of the rounds, the median of libxsmm's time over ours in the same round, and both as
fractions of the CPU's peak. Operands come from the cache if they fit, unless --rotate. Each call allocates its result.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import libxsmm
from benchmarks.ceilings import Ceiling, measure_ceiling
from benchmarks.report import aligned
from benchmarks.suites import Problem, make_suites
from benchmarks.timing import CASE_SECONDS, PRECISIONS, Data, cache_bytes, make_data, reference_of, time_rounds

CPU = torch.device("cpu")
PRECISION = PRECISIONS["float32"]
LIMIT = 1e-5  # of a relative error


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


def measure_product(problem: Problem, name: str, rounds: int, rotate: bool) -> dict[str, list[float]]:
    """Microseconds of "ours", and of "libxsmm" where it applies, in each round.

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
    return time_rounds(steps, rounds, CASE_SECONDS["cpu"], CPU, host=False)


def row(problem: Problem, name: str, times: dict[str, list[float]], ceiling: Ceiling) -> list[str]:
    """A line of the table."""
    batch, num_blocks, in_block, out_block = problem
    operations = 2 * batch * num_blocks * in_block * out_block
    rates = {contestant: 1e6 * operations / statistics.median(each) for contestant, each in times.items()}
    fractions = {contestant: rate / ceiling.operations_per_second for contestant, rate in rates.items()}
    cells = [str(problem), name, f"{1e-9 * rates['ours']:.1f}"]
    if "libxsmm" in times:
        ratio = statistics.median(other / ours for other, ours in zip(times["libxsmm"], times["ours"], strict=False))
        cells += [f"{1e-9 * rates['libxsmm']:.1f}", f"{ratio:.2f}"]
    else:
        cells += ["-", "-"]
    return [*cells, *(f"{fractions[each]:.2f}" if each in fractions else "-" for each in ("ours", "libxsmm"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="libxsmm runs with one only (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each product (default: %(default)s)")
    parser.add_argument("--rotate", action="store_true", help="take operands from memory: exchange them between calls")
    arguments = parser.parse_args(argv)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with torch.no_grad():
            ceiling = measure_ceiling(torch.float32, CPU)
            ratios = ("time libxsmm/ours", "ours of peak", "libxsmm of peak")
            rows = [["B, G, K->N", "product", "ours", "libxsmm", *ratios]]
            for problem in make_suites("cpu")["libxsmm"].problems:
                for name in libxsmm.PRODUCTS:
                    times = measure_product(problem, name, arguments.rounds, arguments.rotate)
                    rows.append(row(problem, name, times, ceiling))
    finally:
        torch.set_num_threads(threads_before)
    kind = f"peak of {ceiling.instruction_set}" if ceiling.instruction_set else "GEMM, in place of a peak"
    print(f"GFLOP/s, threads: {arguments.threads}, {kind}: {1e-9 * ceiling.operations_per_second:.1f}")
    print("\n".join(aligned(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
