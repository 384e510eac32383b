"""Compares ours in two runs, by its time over the loop's in the same round. Machines drift, this ratio does not."""

from typing import NamedTuple

from benchmarks.runs import Case, Content, key_of, quartiles, ratios, times_of

TOLERANCE = 1.05  # by how much the median may be worse
# If these differ, two runs are hard to compare.
ENVIRONMENT = ("torch", "CPU", "GPUs", "BLAS of torch", "CPU GEMM", "cuBLAS", "driver", "BLOCKDIAG_CPU_GEMM")


class Regression(NamedTuple):
    """A case where ours became slower relative to the loop; (low, median, high) are quartiles of ours / loop."""

    key: tuple
    old: tuple[float, float, float]
    new: tuple[float, float, float]

    def __str__(self) -> str:
        suite, problem, *setting = self.key
        old, new = (f"{median:.3f} [{low:.3f}, {high:.3f}]" for low, median, high in (self.old, self.new))
        worse = 100 * (self.new[1] / self.old[1] - 1)
        return f"{suite} {problem}, {', '.join(map(str, setting))}: ours/loop {old} -> {new}, {worse:.0f} % worse"


def differences(old: Content, new: Content) -> list[str]:
    """What differs between the environments."""
    names = [name for name in ENVIRONMENT if old["environment"].get(name) != new["environment"].get(name)]
    return [f"{name}: {old['environment'].get(name)} -> {new['environment'].get(name)}" for name in names]


def _comparable(content: Content) -> dict[tuple, Case]:
    return {key_of(case): case for case in content["cases"] if {"ours", "loop"} <= times_of(case).keys()}


def compare(old: Content, new: Content) -> tuple[int, list[Regression]]:
    """The number of cases that both runs have, and those that became slower, beyond the spread.

    That is: the quartile ranges of ours / loop do not overlap, and the median is worse by more than TOLERANCE.

    Raises:
        ValueError: the runs are of different devices, or have no case in common.
    """
    devices = [content["environment"].get("device") for content in (old, new)]
    if devices[0] != devices[1]:
        raise ValueError(f"nothing to compare: the old run is of device {devices[0]}, the new one of {devices[1]}")
    before, after = _comparable(old), _comparable(new)
    common = [key for key in after if key in before]
    if not common:
        raise ValueError(
            f"nothing to compare: none of the {len(after)} new cases is among the {len(before)} old ones "
            "(suite, problem, precision, pass, mode and threads must be the same)"
        )
    regressions = []
    for key in common:
        was, now = (quartiles(ratios(cases[key], "ours", "loop")) for cases in (before, after))
        if now[0] > was[2] and now[1] > TOLERANCE * was[1]:
            regressions.append(Regression(key, was, now))
    return len(common), regressions
