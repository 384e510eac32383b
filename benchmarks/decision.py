"""Which library should compute ours on a GPU: the winner of each problem, and the rule's verdict on a result.

The rule: small_blocks where it is at least SMALL_GAIN times as fast as cuBLASLt with all that it fuses; elsewhere
cuBLASLt by its heuristic, for the types that it takes; cuBLAS for the others. Tuning stays opt-in, unless it gains
TUNING_GAIN over a suite.
"""

import statistics
from collections.abc import Iterable

from benchmarks.contestants import OURS
from benchmarks.report import aligned, groups, skips
from benchmarks.runs import Case, Content, best_other, median_us, problem_of, speedup, times_of

LIBRARY_OF = {"ours_fused": "fused", "ours_lt": "cublaslt"}
SMALL_GAIN = 1.3
TUNING_GAIN = 1.1


def _setting(case: Case) -> tuple[str, str, str, str]:
    return (case["suite"], case["precision"], case["pass"], case["mode"])


def _winner(case: Case) -> str | None:
    """The fastest of ours, or None if none ran."""
    ran = [name for name in OURS if name in times_of(case)]
    return min(ran, key=lambda name: median_us(case, name), default=None)


def _heuristic(cases: list[Case]) -> str:
    """The variant that computes by cuBLASLt's heuristic: with all that it fuses, unless results are older than that."""
    return next((name for name in LIBRARY_OF if any(name in times_of(case) for case in cases)), "ours_lt")


def _ratio(case: Case, of: str, over: str) -> float | None:
    return speedup(case, of, over) if {of, over} <= times_of(case).keys() else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table(cases: list[Case]) -> str:
    """A row for each case: median microseconds, the fastest variant of ours, and its speedup over cuBLAS, cuBLASLt by
    its heuristic, and the fastest contestant that is not ours."""
    variant = _heuristic(cases)
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    rows = [
        ["B, G, K->N", "precision", "pass", *names, "floor", "winner", "/ours_cublas", f"/{variant}", "/other", "other"]
    ]
    for case in cases:
        times = [f"{median_us(case, name):.4g}" if name in times_of(case) else "-" for name in names]
        row = [str(problem_of(case)), case["precision"], case["pass"], *times, f"{case['floor_us']:.3g}"]
        winner = _winner(case)
        if winner is None:
            rows.append([*row, *["-"] * 5])
            continue
        other = best_other(case, winner)
        ratios = [_ratio(case, winner, name) if name else None for name in ("ours_cublas", variant, other)]
        rows.append([*row, winner, *map(_cell, ratios), other or "-"])
    return "\n".join(aligned(rows))


def _gains(cases: Iterable[Case], of: str, over: str) -> dict[str, float]:
    """The speedup, by problem."""
    ratios = {str(problem_of(case)): _ratio(case, of, over) for case in cases}
    return {problem: ratio for problem, ratio in ratios.items() if ratio is not None}


def _verdict(what: str, gains: dict[str, float], wanted: float, yes: str, no: str) -> list[list[str]]:
    """A row with the geometric mean of the gains, or none if nothing was measured."""
    if not gains:
        return []
    mean = statistics.geometric_mean(gains.values())
    worst = min(gains, key=lambda problem: gains[problem])
    numbers = [f"{mean:.2f}", f"{gains[worst]:.2f} at {worst}", f"{max(gains.values()):.2f}", str(len(gains))]
    return [[what, *numbers, yes if mean >= wanted else no]]


def verdicts(cases: list[Case]) -> str:
    """The rule's verdicts, setting by setting; for small_blocks also by the larger side of a block."""
    rows = []
    for (suite, precision, which, mode), of_setting in groups(cases, _setting):
        setting = f"{suite}, {precision}, {which}, {mode}"
        gains = _gains(of_setting, "ours_lt", "ours_cublas")
        rows += _verdict(f"cublaslt / cublas: {setting}", gains, 1.0, "cublaslt", "cublas: look why")
        gains = _gains(of_setting, "ours_fused", "ours_lt")
        rows += _verdict(f"fused / cublaslt: {setting}", gains, 1.0, "fused", "cublaslt: look why")
        variant = _heuristic(of_setting)
        library = LIBRARY_OF[variant]
        gains = _gains(of_setting, "ours_tuned", variant)
        rows += _verdict(f"tuned / {library}: {setting}", gains, TUNING_GAIN, "tune by default", "tune on request")
        for limit in (16, 32, 64):
            of_size = [case for case in of_setting if limit // 2 < max(problem_of(case)[2:]) <= limit]
            gains = _gains(of_size, "ours_small", variant)
            rows += _verdict(f"small_blocks / {library} up to {limit}: {setting}", gains, SMALL_GAIN, "keep", "drop")
        gains = _gains(of_setting, "ours_small", "ours_unsplit") if which == "fwd+bwd" else {}
        rows += _verdict(f"split / unsplit sums: {setting}", gains, 1.0, "split", "do not split")
    return "\n".join(aligned([["of", "mean", "worst", "best", "problems", "so"], *rows]))


def report(content: Content) -> str:
    """The table, the verdicts, and which variants of ours are wrong or do not run."""
    cases = content["cases"]
    parts = [table(of_suite) for _, of_suite in groups(cases, lambda case: case["suite"])]
    for setting, left_out in groups(content["left_out"], _setting):
        parts.append(f"Left out for lack of time: {len(left_out)} of {', '.join(setting)}")
    return "\n\n".join(filter(None, [*parts, skips(cases), verdicts(cases)]))
