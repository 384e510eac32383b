"""The JSON of a run, and the numbers that tables, plots and comparisons compute from it.

{
  "environment": {name: value, ...},                 report of python -m blockdiag, device, commit, date, driver
  "settings": {"rounds", "arguments"},
  "ceilings": [{"dtype", "threads", "operations_per_second", "bytes_per_second", "instruction_set",
                "read_bytes_per_second", "copy_bytes_per_second"}, ...],           fields of ceilings.Ceiling
  "cases": [{"suite", "problem": {"batch", "num_blocks", "in_block", "out_block"},
             "precision", "pass", "mode", "threads", "floor_us",
             "contestants": {name: {"times_us": [...], "peak_bytes"} or {"skipped": reason}
                             or of ours {"failed": reason}}}, ...],
  "left_out": [{"suite", "problem", "precision", "pass", "mode", "threads"}, ...]     for lack of time
}

Older results have no fields after "bytes_per_second", which is that of a copy, as the rate is that of a GEMM.
"times_us" has the microseconds of one run in each round; slow contestants skip the last rounds. "floor_us" is the
roofline's time.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.contestants import OURS
from benchmarks.suites import Problem

Case = dict[str, Any]
Content = dict[str, Any]


def save(content: Content, path: Path) -> None:
    """Writes the JSON, one line per case."""
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in content.items() if key not in lists]
    for key, items in lists.items():
        lines = ",\n".join(f"  {json.dumps(item)}" for item in items)
        parts.append(f" {json.dumps(key)}: [\n{lines}\n ]" if items else f" {json.dumps(key)}: []")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def load(path: Path) -> Content:
    """Reads the JSON of a run.

    Raises:
        ValueError: it cannot be read, or is not such a JSON.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    wanted = {"environment", "settings", "ceilings", "cases", "left_out"}
    if not isinstance(content, dict) or not wanted <= content.keys():
        raise ValueError(f"{path} is not a result of python -m benchmarks: it lacks {', '.join(sorted(wanted))}")
    return content


def round_times(times_us: list[float]) -> list[float]:
    """Rounds to 4 significant digits, to keep the file small."""
    return [float(f"{time_us:.4g}") for time_us in times_us]


def problem_of(case: Case) -> Problem:
    return Problem(**case["problem"])


def key_of(case: Case) -> tuple:
    """Identifies what is measured, to match the cases of two runs."""
    return (case["suite"], problem_of(case), *(case[name] for name in ("precision", "pass", "mode", "threads")))


def times_of(case: Case) -> dict[str, list[float]]:
    """The times of the contestants that ran."""
    return {name: entry["times_us"] for name, entry in case["contestants"].items() if "times_us" in entry}


def median_us(case: Case, name: str) -> float:
    return statistics.median(case["contestants"][name]["times_us"])


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, median, high


def ratios(case: Case, name: str, over: str) -> list[float]:
    """The time of one contestant over that of another, in each round that both ran."""
    times = times_of(case)
    return [one / other for one, other in zip(times[name], times[over], strict=False)]


def speedup(case: Case, of: str, over: str) -> float:
    """The speedup of one contestant over another: the median over the rounds."""
    return statistics.median(ratios(case, over, of))


def best_other(case: Case, ours: str = "ours") -> str | None:
    """The fastest contestant other than ours and its variants, relative to one of these; None if either is missing."""
    others = [name for name in times_of(case) if name not in OURS and ours in times_of(case)]
    return min(others, key=lambda name: speedup(case, ours, name), default=None)


def of_floor(case: Case, name: str) -> float:
    """The floor over the time: the fraction of the roofline."""
    return case["floor_us"] / median_us(case, name)
