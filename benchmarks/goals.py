"""Checks results of one GPU against the goals: which are met, in how many cases, and by how much the worst misses."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.contestants import OURS
from benchmarks.report import aligned
from benchmarks.runs import Case, Content, best_other, median_us, problem_of, speedup, times_of
from benchmarks.timing import PRECISIONS

WORKSPACE_BYTES = 32 << 20
ROUNDING_BYTES = 16 * 512  # torch rounds the size of each tensor up to 512 bytes, and there are no more than 16
KERNEL_US = 4.0
LARGE_FLOOR_US = 20.0


class Value(NamedTuple):
    """What a case reaches, the least that it should reach, and what it is compared with."""

    reached: float
    goal: float
    against: str


# The value of a contestant that ran in a case; None if the goal does not apply to the case.
Goal = Callable[[Case, str], Value | None]


def _speedup(case: Case, name: str, over: str, goal: float) -> Value | None:
    return Value(speedup(case, name, over), goal, over) if over in times_of(case) else None


def _fastest(case: Case, name: str) -> Value | None:
    if case["suite"] != "ensemble" or case["precision"] != "amp-float16" or case["mode"] != "graph":
        return None
    best = best_other(case, name)
    return _speedup(case, name, best, 0.97) if best else None


def _loop_of_16(case: Case, name: str) -> Value | None:
    _, num_blocks, *sizes = problem_of(case)
    applies = case["suite"] == "ensemble" and num_blocks == 16 and max(sizes) <= 512
    if not applies or case["precision"] != "amp-float16" or case["mode"] != "eager":
        return None
    return _speedup(case, name, "loop", 5.0)


def _published(case: Case, name: str) -> Value | None:
    others = {"dense", "loop", "masked_dense"} & times_of(case).keys()
    if case["suite"] != "partitioned" or not others:
        return None
    return min((Value(speedup(case, name, other), 1.0, other) for other in sorted(others)), key=lambda v: v.reached)


def _recommender(case: Case, name: str) -> Value | None:
    if case["suite"] != "recommender" or case["precision"] != "bfloat16":
        return None
    return _speedup(case, name, "loop", 1.6 if case["pass"] == "fwd" else 1.5)


def _large(case: Case, name: str) -> Value | None:
    if case["suite"] == "overhead" or case["floor_us"] <= LARGE_FLOOR_US:
        return None
    return Value(case["floor_us"] / median_us(case, name), 0.8 if case["pass"] == "fwd" else 0.75, "floor")


def _kernels(case: Case) -> int:
    """The number of kernels: a product; in the backward pass two more, and the sum for the bias's gradient; under
    autocast the casts of x, weight and bias, and of their gradients."""
    backward = case["pass"] == "fwd+bwd"
    casts = 3 if PRECISIONS[case["precision"]].autocast else 0
    return (4 if backward else 1) + casts * (2 if backward else 1)


def _small(case: Case, name: str) -> Value | None:
    """For CUDA graphs: in eager mode such a problem is limited by the host's call."""
    if case["suite"] == "overhead" or case["mode"] != "graph" or case["floor_us"] > LARGE_FLOOR_US:
        return None
    kernels = KERNEL_US * _kernels(case)
    against = "floor" if case["floor_us"] > kernels else f"{kernels:g} us"
    return Value(max(case["floor_us"], kernels) / median_us(case, name), 1 / 1.5, against)


def _memory(case: Case, name: str) -> Value | None:
    """In eager mode, where the peak includes cuBLAS's workspace. Autocast's casts are allowed beside the results."""
    if case["suite"] == "overhead" or case["mode"] != "eager":
        return None
    batch, num_blocks, in_block, out_block = problem_of(case)
    precision = PRECISIONS[case["precision"]]
    operands = num_blocks * (batch * in_block + out_block * in_block + out_block)
    allowed = batch * num_blocks * out_block * precision.result.itemsize + WORKSPACE_BYTES + ROUNDING_BYTES
    passes = 2 if case["pass"] == "fwd+bwd" else 1
    if passes == 2:
        allowed += operands * precision.dtype.itemsize
    if precision.autocast is not None:
        allowed += passes * operands * precision.result.itemsize
    peak = case["contestants"][name]["peak_bytes"]
    return Value(allowed / peak if peak else 1.0, 1.0, f"{(peak - allowed) / 2**20:+.1f} MiB")


def _host(case: Case, name: str) -> Value | None:
    applies = case["suite"] == "overhead" and case["mode"] == "eager"
    return _speedup(case, name, "dense", 1 / 1.3) if applies else None


GOALS: dict[str, Goal] = {
    "(a) the fastest": _fastest,
    "(a) 5 times the loop at G=16, K<=512": _loop_of_16,
    "(b) faster than A, B and C": _published,
    "(c) the loop": _recommender,
    f"floor over {LARGE_FLOOR_US:g} us": _large,
    f"floor up to {LARGE_FLOOR_US:g} us": _small,
    "peak memory": _memory,
    "host time of a call: F.linear": _host,
}


def _where(case: Case, value: Value) -> str:
    return f"{problem_of(case)}, {case['precision']} ({value.against})"


def _rows(cases: list[Case], name: str) -> Iterable[list[str]]:
    """A row for each goal, pass and mode; goals that no case applies to have one row."""
    for goal, value_of in GOALS.items():
        values: dict[tuple[str, str], list[tuple[Case, Value]]] = {}
        for case in cases:
            value = value_of(case, name)
            if value is not None:
                values.setdefault((case["pass"], case["mode"]), []).append((case, value))
        if not values:
            yield [goal, "", "", "not measured", "", "", "", "", ""]
        for (which, mode), of_setting in sorted(values.items()):
            met = sum(value.reached >= value.goal for _, value in of_setting)
            case, worst = min(of_setting, key=lambda pair: pair[1].reached / pair[1].goal)
            off = f"{100 * (worst.reached / worst.goal - 1):+.0f} %"
            numbers = [f"{met}/{len(of_setting)}", f"{worst.reached:.3g}", f"{worst.goal:.3g}", off]
            verdict = "met" if met == len(of_setting) else "MISSED"
            yield [goal, which, mode, verdict, *numbers, _where(case, worst)]


def report(contents: list[Content]) -> tuple[str, bool]:
    """A table for each variant of ours, and whether the default one ran, and met every goal that was measured.

    Raises:
        ValueError: the results are not of one kind of GPU.
    """
    devices = {content["environment"].get("GPUs", "none") for content in contents}
    if len(devices) > 1 or "none" in devices:
        raise ValueError(f"the goals are of one GPU, but the results are of: {', '.join(sorted(devices))}")
    cases = [case for content in contents for case in content["cases"]]
    texts, met = [], False
    for name in OURS:
        of_name = [case for case in cases if name in times_of(case)]
        if not of_name:
            continue
        rows = list(_rows(of_name, name))
        if name == "ours":
            met = all(row[3] != "MISSED" for row in rows)
        head = [f"{name}: {len(of_name)} cases", "pass", "mode", "", "met at", "worst", "goal", "off", "at"]
        texts.append("\n".join(aligned([head, *rows])))
    return "\n\n".join(texts), met
