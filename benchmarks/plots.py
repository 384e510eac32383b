"""Plots of a run: speedup over the loop, fraction of the floor (the roofline), and how time scales."""

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.contestants import CONTESTANTS, CUDA_VARIANTS
from benchmarks.report import groups
from benchmarks.runs import Case, Content, median_us, of_floor, problem_of, speedup, times_of

WIDTH = 9.0  # inches; at DPI, as wide as a README
DPI = 100
OURS = "#d55e00"
# For the others, in the order of the contestants. Neighbors differ in lightness, not only in hue, and in their marker.
COLORS = (
    *("#000000", "#888888", "#c3b091", "#8c564b", "#999933", "#cc79a7", "#e69f00"),
    *("#6a3d9a", "#56b4e9", "#0072b2", "#332288", "#009e73", "#aa4499", "#661100"),
    "#44aa99",
)
MARKERS = "osDv^<>ph*XdP8H"

Value = Callable[[Case, str], float]
METRICS: dict[str, tuple[str, Value]] = {
    "speedup": ("times as fast as the loop", lambda case, name: speedup(case, name, "loop")),
    "floor": ("floor over time (1: all that the machine can do)", of_floor),
}


def style(name: str) -> dict:
    """The style of a contestant, the same in all plots."""
    if name == "ours":
        return {"color": OURS, "marker": "o", "linewidth": 2.4, "markersize": 5, "zorder": 10}
    if name in CUDA_VARIANTS:
        marker = MARKERS[1 + list(CUDA_VARIANTS).index(name)]
        return {"color": OURS, "marker": marker, "linestyle": "--", "linewidth": 1.2, "markersize": 4, "zorder": 9}
    others = [other for other in CONTESTANTS if other != "ours"]
    index = others.index(name) if name in others else len(others)
    color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
    return {"color": color, "marker": marker, "linewidth": 0.9, "markersize": 3, "zorder": 3}


def _names(cases: Iterable[Case]) -> list[str]:
    ran = {name for case in cases for name in times_of(case)}
    known = [name for name in (*CONTESTANTS, *CUDA_VARIANTS) if name in ran]
    return [*known, *sorted(ran.difference(known))]


def _plain(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _log2_ticks(axis) -> None:
    axis.set_major_locator(LogLocator(base=2, numticks=6))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=2)


def _finish(figure: Figure, title: str, names: list[str], path: Path, legend_lines: bool = True) -> Path:
    """Adds one legend below the panels, and the title above them."""
    styles = [style(name) if legend_lines else {**style(name), "linestyle": "none"} for name in names]
    handles = [plt.Line2D([], [], label=name, **each) for name, each in zip(names, styles, strict=True)]
    columns = min(len(handles), 7)
    rows = math.ceil(len(handles) / columns)
    height = figure.get_figheight()
    figure.suptitle(title, x=0.01, y=1 - 0.08 / height, ha="left", va="top", fontsize=10, fontweight="bold")
    figure.legend(handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8)
    figure.get_layout_engine().set(rect=(0, (0.12 + 0.2 * rows) / height, 1, 1 - (0.47 + 0.2 * rows) / height))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _limit(axes: Axes, values: dict[str, list[float]]) -> None:
    """Limits a log axis to the range around ours and the loop; the slowest contestants are cut off."""
    center = [value for name in ("ours", "loop") for value in values.get(name, [])]
    every = [value for each in values.values() for value in each]
    if center:
        axes.set_ylim(max(min(every) / 1.2, min(center) / 8), max(every) * 1.3)


def plot_sizes(cases: list[Case], metric: str, title: str, path: Path, panel: str, panel_label: str) -> Path:
    """Against the size of a block: a panel for each value of a field of the problem, a row of panels for each pass.

    The size of a block K -> N is the square root of K N; problems of one size are averaged geometrically.
    """
    names, (label, value) = _names(cases), METRICS[metric]
    passes = list(dict.fromkeys(case["pass"] for case in cases))
    columns = sorted({case["problem"][panel] for case in cases})
    figure, grid = plt.subplots(
        len(passes), len(columns), figsize=(WIDTH, 1 + 2.1 * len(passes)), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for which, row in zip(passes, grid, strict=True):
        values: dict[str, list[float]] = {}
        for column, axes in zip(columns, row, strict=True):
            shown = [case for case in cases if case["pass"] == which and case["problem"][panel] == column]
            for name in names:
                points: dict[float, list[float]] = {}
                for case in shown:
                    if {name, "loop"} <= times_of(case).keys():
                        problem = problem_of(case)
                        size = math.sqrt(problem.in_block * problem.out_block)
                        points.setdefault(size, []).append(value(case, name))
                sizes = sorted(points)
                heights = [statistics.geometric_mean(points[size]) for size in sizes]
                values.setdefault(name, []).extend(heights)
                axes.plot(sizes, heights, **style(name))
            axes.set(xscale="log", yscale="log")
            _log2_ticks(axes.xaxis)
            _log2_ticks(axes.yaxis)
            _tidy(axes)
        _limit(row[0], values)
        row[0].set_ylabel(which, fontsize=9)
    for column, axes in zip(columns, grid[0], strict=True):
        axes.set_title(f"{panel_label} = {column}", fontsize=9)
    grid[-1][len(columns) // 2].set_xlabel("block size", fontsize=9)
    return _finish(figure, f"{title}: {label}", names, path)


def plot_problems(cases: list[Case], metric: str, title: str, path: Path) -> Path:
    """A row for each problem, a panel for each pass, a dot for each contestant."""
    names, (label, value) = _names(cases), METRICS[metric]
    passes = list(dict.fromkeys(case["pass"] for case in cases))
    problems = list(dict.fromkeys(problem_of(case) for case in cases))[::-1]
    size = (WIDTH, 1.6 + 0.24 * len(problems))
    figure, panels = plt.subplots(1, len(passes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for which, axes in zip(passes, panels[0], strict=True):
        values: dict[str, list[float]] = {}
        for case in cases:
            if case["pass"] == which and "loop" in times_of(case):
                for name in times_of(case):
                    values.setdefault(name, []).append(value(case, name))
                    look = {**style(name), "linestyle": "none", "markersize": 7 if name == "ours" else 4.5}
                    axes.plot(values[name][-1], problems.index(problem_of(case)), **look)
        axes.set(xscale="log", yticks=range(len(problems)), ylim=(-0.6, len(problems) - 0.4))
        axes.set_yticklabels([str(problem).replace("->", "→") for problem in problems])
        axes.set_title(which, fontsize=9)
        _log2_ticks(axes.xaxis)
        _tidy(axes)
        center = [value for name in ("ours", "loop") for value in values.get(name, [])]
        every = [value for each in values.values() for value in each]
        if center:
            axes.set_xlim(max(min(every) / 1.2, min(center) / 8), max(every) * 1.3)
    figure.supylabel("B, G, K→N", fontsize=9)
    return _finish(figure, f"{title}: {label}", names, path, legend_lines=False)


def plot_scaling(cases: list[Case], title: str, path: Path) -> Path:
    """The time against the number of blocks and against the batch, with a proportional line for reference."""
    names = _names(cases)
    passes = list(dict.fromkeys(case["pass"] for case in cases))
    figure, grid = plt.subplots(
        len(passes), 2, figsize=(WIDTH, 1 + 2.5 * len(passes)), sharex="col", squeeze=False, layout="constrained"
    )
    axes_of = {"num_blocks": ("number of blocks", "batch"), "batch": ("batch", "num_blocks")}
    for which, row in zip(passes, grid, strict=True):
        for (field, (label, fixed)), axes in zip(axes_of.items(), row, strict=True):
            of_pass = [case for case in cases if case["pass"] == which]
            # The series in which the other field has its most frequent value.
            value = statistics.mode(case["problem"][fixed] for case in of_pass)
            shown = sorted(
                (case for case in of_pass if case["problem"][fixed] == value), key=lambda case: case["problem"][field]
            )
            for name in names:
                ran = [case for case in shown if name in times_of(case)]
                axes.plot(
                    [case["problem"][field] for case in ran], [median_us(case, name) for case in ran], **style(name)
                )
            first, last = shown[0], shown[-1]
            end, height = last["problem"][field], median_us(last, "ours")
            start = first["problem"][field]
            axes.plot([start, end], [height * start / end, height], color="#777777", linestyle=":", linewidth=1)
            axes.annotate(
                "proportional", (math.sqrt(start * end), height * math.sqrt(start / end)), (4, -10),
                textcoords="offset points", fontsize=8, color="#777777",
            )  # fmt: skip
            axes.set(xscale="log", yscale="log", xlabel=label if which == passes[-1] else "")
            problem = problem_of(last)
            other = f"B = {value}" if fixed == "batch" else f"G = {value}"
            axes.set_title(f"{which}: {other}, {problem.in_block}→{problem.out_block}", fontsize=9)
            _log2_ticks(axes.xaxis)
            _tidy(axes)
        row[0].set_ylabel("microseconds", fontsize=9)
    return _finish(figure, f"{title}: time", names, path)


def plot(content: Content, folder: Path, stem: str) -> list[Path]:
    """Saves all plots of a run as PNG in `folder`, with names that begin with `stem`; returns their paths.

    One plot of each metric for each suite, precision, mode and number of threads; none for a suite of one problem.
    """
    paths = []
    setting = ("suite", "precision", "mode", "threads")
    for (suite, precision, mode, threads), cases in groups(content["cases"], lambda c: tuple(c[k] for k in setting)):
        threads_text = f"{threads} thread{'' if threads == 1 else 's'}"
        title = f"{suite}, {precision}, {mode}, {threads_text}"
        name = f"{stem}-{suite}-{precision}-{mode}-{threads_text.replace(' ', '-')}"
        if suite == "scaling":
            paths.append(plot_scaling(cases, title, folder / f"{name}.png"))
        elif len({problem_of(case) for case in cases}) > 1:
            for metric in METRICS:
                path = folder / f"{name}-{metric}.png"
                if suite == "ensemble":
                    paths.append(plot_sizes(cases, metric, title, path, "num_blocks", "G"))
                elif suite == "partitioned":
                    paths.append(plot_sizes(cases, metric, title, path, "batch", "B"))
                else:
                    paths.append(plot_problems(cases, metric, title, path))
    return paths
