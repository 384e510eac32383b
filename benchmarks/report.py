"""Tables of the times, and a summary that compares ours with the others."""

import statistics
from collections.abc import Iterable
from itertools import groupby

from benchmarks.runs import Case, Content, best_other, median_us, of_floor, problem_of, speedup, times_of

LARGE_BLOCK = 256  # blocks of this size and more can use the whole machine


def _setting(case: Case) -> tuple:
    return (case["suite"], case["threads"], case["precision"], case["pass"], case["mode"])


def groups(cases: Iterable[Case], setting=_setting) -> list[tuple[tuple, list[Case]]]:
    """The cases by setting, in the order of their first appearance, even if others ran in between."""
    cases = list(cases)
    order = {value: index for index, value in enumerate(dict.fromkeys(map(setting, cases)))}
    ordered = sorted(cases, key=lambda case: order[setting(case)])
    return [(value, list(group)) for value, group in groupby(ordered, key=setting)]


def _title(setting: tuple) -> str:
    suite, threads, precision, which, mode = setting
    return f"{suite}: {precision}, {which}, {mode}, {threads} thread{'' if threads == 1 else 's'}"


def _cell(case: Case, name: str) -> str:
    return f"{median_us(case, name):.4g}" if name in times_of(case) else "-"


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as text: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]


def table(cases: list[Case]) -> str:
    """One setting: a row for each problem with median times in microseconds, the floor, and ratios to ours."""
    names = list(dict.fromkeys(name for case in cases for name in case["contestants"]))
    shown = [name for name in names if any(name in times_of(case) for case in cases)]
    rows = [["B, G, K->N", *shown, "floor", "of floor", "loop/ours", "best/ours", "MiB ours", "MiB loop"]]
    for case in cases:
        row = [str(problem_of(case)), *(_cell(case, name) for name in shown), f"{case['floor_us']:.4g}"]
        row.append(f"{of_floor(case, 'ours'):.2f}" if "ours" in times_of(case) else "-")
        row += [f"{ratio:.2f}" if ratio else "-" for ratio in (_over(case, "loop"), _over(case, best_other(case)))]
        peaks = [case["contestants"].get(name, {}).get("peak_bytes") for name in ("ours", "loop")]
        rows.append([*row, *("-" if peak is None else f"{peak / 2**20:.3g}" for peak in peaks)])
    return "\n".join(aligned(rows))


def _over(case: Case, name: str | None) -> float | None:
    """The time of a contestant over ours, if both ran."""
    return speedup(case, "ours", name) if name and {"ours", name} <= times_of(case).keys() else None


def skips(cases: list[Case]) -> str:
    """Which contestants did not run or failed, why, and in how many problems."""
    reasons = [
        (name, word, entry[key])
        for key, word in (("failed", "FAILED"), ("skipped", "not run"))
        for case in cases
        for name, entry in case["contestants"].items()
        if key in entry
    ]
    return "\n".join(
        f"  {name} {word} at {reasons.count((name, word, reason))}: {reason}"
        for name, word, reason in dict.fromkeys(reasons)
    )


def tables(content: Content) -> str:
    """A table for each suite and setting, followed by what was skipped."""
    parts = [
        f"{_title(setting)} (medians in microseconds)\n{table(cases)}\n{skips(cases)}".rstrip()
        for setting, cases in groups(content["cases"])
    ]
    return "\n\n".join(parts)


def _spread(values: dict[str, float]) -> list[str]:
    """Geometric mean, minimum, and where the minimum is."""
    if not values:
        return ["-", "-", "-"]
    where = min(values, key=lambda problem: values[problem])
    return [f"{statistics.geometric_mean(values.values()):.2f}", f"{values[where]:.2f}", where]


def summary(content: Content) -> str:
    """For each suite and setting, ours against the best other contestant, the loop and the floor.

    `best` includes the dense layer, although only in inference it is the same layer.
    """
    rows = []
    for (suite, threads, precision, which, mode), cases in groups(content["cases"]):
        best, loop, floor, large = {}, {}, {}, {}
        for case in cases:
            problem = problem_of(case)
            name = best_other(case)
            if "ours" not in times_of(case) or name is None:
                continue
            best[f"{problem} ({name})"] = speedup(case, "ours", name)
            if "loop" in times_of(case):
                loop[str(problem)] = speedup(case, "ours", "loop")
            floor[str(problem)] = of_floor(case, "ours")
            if min(problem.in_block, problem.out_block) >= LARGE_BLOCK and problem.batch >= 128:
                large[str(problem)] = floor[str(problem)]
        setting = [suite, precision, which, mode, str(threads), str(len(cases))]
        rows.append([setting, *(_spread(values) for values in (best, loop, floor, large))])
    texts = [
        "Ours against the best other contestant and against the loop: their time over ours. Ours against the floor:\n"
        f"the floor over our time; `large` is the same for blocks of {LARGE_BLOCK} and more with 128 rows and more."
    ]
    head = ["suite", "precision", "pass", "mode", "threads", "cases", "mean", "min", "at"]
    for index, what in enumerate(("best other", "loop", "floor", "floor, large"), start=1):
        lines = [[*row[0], *row[index]] for row in rows if row[index][0] != "-"]
        if lines:
            texts.append(f"against the {what}:\n" + "\n".join(aligned([head, *lines])))
    return "\n\n".join([*texts, _ceilings(content)])


def _ceilings(content: Content) -> str:
    rows = [["dtype", "threads", "GFLOP/s", "of", "GB/s of reading", "of a copy (read + write)"]]
    for ceiling in content["ceilings"]:
        kind = ceiling.get("instruction_set") or "GEMM"
        # Older results have one bandwidth, that of a copy.
        read, copy = ceiling.get("read_bytes_per_second"), ceiling.get("copy_bytes_per_second")
        rates = ["-" if rate is None else f"{1e-9 * rate:.4g}" for rate in (read, copy or ceiling["bytes_per_second"])]
        operations = f"{1e-9 * ceiling['operations_per_second']:.4g}"
        rows.append([ceiling["dtype"], str(ceiling["threads"]), operations, kind, *rates])
    return "ceilings of the machine:\n" + "\n".join(aligned(rows))


def markdown(content: Content) -> str:
    """For each suite and number of threads: the loop's time over ours, and in brackets that of the best other."""
    parts = []
    for (suite, threads), cases in groups(content["cases"], lambda c: (c["suite"], c["threads"])):
        modes = list(dict.fromkeys(case["mode"] for case in cases))
        columns = list(dict.fromkeys((case["precision"], case["pass"], case["mode"]) for case in cases))
        cells: dict = {}
        for case in cases:
            loop, best = _over(case, "loop"), _over(case, best_other(case))
            text = f"{loop:.2f} ({best:.2f})" if loop and best else "-"
            cells.setdefault(problem_of(case), {})[case["precision"], case["pass"], case["mode"]] = text
        rows = [
            ["B, G, K→N", *(", ".join(column if len(modes) > 1 else column[:2]) for column in columns)],
            ["---"] * (len(columns) + 1),
            *([str(problem).replace("->", "→"), *(row.get(c, "-") for c in columns)] for problem, row in cells.items()),
        ]
        plural = "" if threads == 1 else "s"
        setting = f"{suite}, {' and '.join(modes)}, {threads} thread{plural}"
        title = f"{setting}: time of the loop (of the best other contestant) over ours"
        parts.append("\n".join([title, "", *(f"| {' | '.join(row)} |" for row in rows)]))
    return "\n\n".join(parts)
