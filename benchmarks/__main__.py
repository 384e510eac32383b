"""Times the ways to write a block-diagonal linear layer, and writes all numbers with the environment as JSON.

Every contestant is checked against float64 before it is timed; then they run in turn, round by round. --show prints an
older result, or the part of it that --suites, --precisions, --passes and --modes select.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Collection
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from benchmarks import decision, goals, report, runs
from benchmarks.arguments import positive
from benchmarks.ceilings import Ceiling, floor_us, measure_ceiling
from benchmarks.compare import compare, differences
from benchmarks.contestants import COMPILED, CONTESTANTS, CUDA_VARIANTS, LIBRARIES
from benchmarks.suites import Problem, Suite, make_suites
from benchmarks.timing import PRECISIONS, measure
from blockdiag.__main__ import report as blockdiag_report

MODES = ("eager", "compiled", "graph")
PASSES = ("fwd", "fwd+bwd")
SAVE_SECONDS = 20.0  # between writes of what is measured, in case the process is killed


class Plan(NamedTuple):
    """One case to measure."""

    threads: int
    precision: str
    suite: str
    problem: Problem
    which: str
    mode: str

    def as_json(self) -> runs.Case:
        problem = self.problem._asdict()
        setting = {"precision": self.precision, "pass": self.which, "mode": self.mode, "threads": self.threads}
        return {"suite": self.suite, "problem": problem, **setting}


def _suite(text: str) -> tuple[str, list[str]]:
    """Parses "NAME" or "NAME:PRECISION,..." into the name and the precisions."""
    name, _, precisions = text.partition(":")
    chosen = precisions.split(",") if precisions else []
    known = make_suites("cpu")
    for word, words in ((name, known), *((precision, PRECISIONS) for precision in chosen)):
        if word not in words:
            raise argparse.ArgumentTypeError(f"invalid choice: {word!r} (choose from {', '.join(words)})")
    return name, chosen


def parse_arguments(argv: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    suites = (
        f"problems: {', '.join(make_suites('cpu'))} (default: quick); ensemble:float16,bfloat16 in these precisions"
    )
    add("--suites", nargs="+", type=_suite, metavar="SUITE", help=suites)
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu", help="default: %(default)s")
    add("--precisions", nargs="+", choices=PRECISIONS, help="default: all but the amp ones")
    add("--passes", nargs="+", choices=PASSES, help="default: both")
    add("--modes", nargs="+", choices=MODES, help="default: eager, and on a GPU graph (CUDA graphs)")
    names = [*CONTESTANTS, *CUDA_VARIANTS]
    add("--contestants", nargs="+", choices=names, help="in addition to ours and the loop (default: the suite's)")
    add("--exclude", nargs="+", choices=names, default=[], help="leave these out, even ours or the loop")
    add("--threads", nargs="+", type=positive(int), default=[torch.get_num_threads()], help="default: %(default)s")
    add("--rounds", type=positive(int), default=15, help="timed rounds of each case (default: %(default)s)")
    add("--max-minutes", type=positive(float), metavar="M", help="start no case after that")
    add("--output", type=Path, metavar="JSON", help="where to write all numbers, even when interrupted")
    add("--plots", type=Path, metavar="DIR", nargs="?", const=Path(), help="plot; DIR defaults to that of the JSON")
    add("--compare", type=Path, metavar="OLD", help="an older JSON: exit with 1 if ours is slower, beyond the spread")
    add("--show", type=Path, metavar="JSON", help="measure nothing, show this")
    goals_help = "measure nothing, check these together against the goals for a GPU: exit with 1 if ours misses one"
    add("--goals", type=Path, metavar="JSON", nargs="+", help=goals_help)
    decide_help = "measure nothing, show which library should compute on a GPU according to this"
    add("--decide", type=Path, metavar="JSON", help=decide_help)
    add("--markdown", action="store_true", help="print Markdown tables, and nothing else, to standard output")
    arguments = parser.parse_args(argv)
    if arguments.goals or arguments.show or arguments.decide:
        if arguments.output:
            parser.error("--show, --goals and --decide measure nothing, so there is no --output to write")
    else:
        if arguments.device == "cuda" and not cuda:
            parser.error("--device cuda, but torch finds no GPU")
        arguments.suites = arguments.suites or [("quick", [])]
        arguments.precisions = arguments.precisions or ["float32", "bfloat16", "float16"]
        arguments.passes = arguments.passes or PASSES
        arguments.modes = arguments.modes or (["eager", "graph"] if arguments.device == "cuda" else ["eager"])
        foreign = [name for name, _ in arguments.suites if name not in make_suites(arguments.device)]
        if foreign:
            parser.error(f"--suites {' '.join(foreign)} needs --device cpu")
        if "graph" in arguments.modes and arguments.device != "cuda":
            parser.error("--modes graph needs --device cuda")
    if arguments.plots == Path():
        if not (arguments.show or arguments.output):
            parser.error("--plots needs a DIR where there is no JSON to put the plots next to")
        arguments.plots = (arguments.show or arguments.output).parent
    for folder in filter(None, (arguments.plots, arguments.output and arguments.output.parent)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"cannot write to {folder}: {error}")
    return parser, arguments


def commit() -> str:
    """The commit that is measured; in a copy without git's history, from $BLOCKDIAG_COMMIT."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # a machine without git
        found = ""
    else:
        found = result.stdout.strip()
    return found or os.environ.get("BLOCKDIAG_COMMIT", "unknown")


def describe_environment(device: str) -> dict[str, str]:
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    environment = {"device": device, **blockdiag_report(), "commit": commit(), "date": date}
    environment.pop("installed", None)  # a path of this machine
    if device == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        except (OSError, subprocess.CalledProcessError):
            driver = ["unknown"]
        environment["driver"] = ", ".join(sorted(set(driver)))
    return environment


def contestants_of(
    suite: Suite, mode: str, device: str, chosen: list[str] | None, excluded: Collection[str] = ()
) -> list[str]:
    """The others are compared with ours and the loop: these run unless excluded, or left out by the suite."""
    variants = CUDA_VARIANTS if device == "cuda" and mode != "compiled" else ()
    wanted = {"ours", "loop", *chosen} if chosen else {"ours", *(suite.contestants or (*CONTESTANTS, *LIBRARIES))}
    wanted -= {*excluded}
    return [name for name in (*(COMPILED if mode == "compiled" else CONTESTANTS), *variants) if name in wanted]


def measure_all(arguments: argparse.Namespace, content: runs.Content) -> bool:
    """Measures all cases, or as many as time allows, into `content`. Returns False if interrupted."""
    device, suites = torch.device(arguments.device), make_suites(arguments.device)
    content["environment"] = describe_environment(arguments.device)
    plans = [
        Plan(threads, precision, name, *case)
        for threads, (name, precisions) in product(arguments.threads, arguments.suites)
        for precision in precisions or arguments.precisions
        for case in product(suites[name].problems, arguments.passes, arguments.modes)
        if not (suites[name].host and case[-1] == "graph")
    ]
    ceilings: dict[tuple[torch.dtype, int], Ceiling] = {}
    threads_before = torch.get_num_threads()
    cudnn_tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # as for products
    began = saved = time.perf_counter()
    progress = tqdm(plans, unit="case")
    try:
        # Before all cases, as one that fails may leave a GPU unusable.
        for dtype, threads in dict.fromkeys((PRECISIONS[plan.precision].result, plan.threads) for plan in plans):
            torch.set_num_threads(threads)
            ceiling = ceilings[dtype, threads] = measure_ceiling(dtype, device)
            name = str(dtype).removeprefix("torch.")
            content["ceilings"].append({"dtype": name, "threads": threads, **ceiling._asdict()})
        for plan in progress:
            if arguments.max_minutes and time.perf_counter() - began > 60 * arguments.max_minutes:
                content["left_out"].append(plan.as_json())
                continue
            progress.set_description(f"{plan.suite} {plan.problem} {plan.precision} {plan.which} {plan.mode}")
            torch.set_num_threads(plan.threads)
            precision, backward = PRECISIONS[plan.precision], plan.which == "fwd+bwd"
            suite = suites[plan.suite]
            measured = measure(
                contestants_of(suite, plan.mode, arguments.device, arguments.contestants, arguments.exclude),
                plan.problem,
                precision,
                device,
                backward=backward,
                mode=plan.mode,
                rounds=arguments.rounds,
                rotate=suite.rotate,
                host=suite.host,
            )
            for entry in measured.values():
                if "times_us" in entry:
                    entry["times_us"] = runs.round_times(entry["times_us"])
            floor = floor_us(plan.problem, precision, backward, ceilings[precision.result, plan.threads])
            case = {**plan.as_json(), "floor_us": float(f"{floor:.4g}"), "contestants": measured}
            content["cases"].append(case)
            if arguments.output and time.perf_counter() - saved > SAVE_SECONDS:
                runs.save(content, arguments.output)
                saved = time.perf_counter()
    except KeyboardInterrupt:
        return False
    finally:
        progress.close()
        torch.set_num_threads(threads_before)
        torch.backends.cudnn.allow_tf32 = cudnn_tf32
    return True


def _part(content: runs.Content, arguments: argparse.Namespace) -> runs.Content:
    """The cases that the arguments select."""

    def named(case: runs.Case) -> bool:
        choices = (
            (case["precision"], arguments.precisions),
            (case["pass"], arguments.passes),
            (case["mode"], arguments.modes),
        )
        suites = [precisions for suite, precisions in arguments.suites or [] if suite == case["suite"]]
        of_suite = not arguments.suites or any(not each or case["precision"] in each for each in suites)
        return of_suite and all(not chosen or value in chosen for value, chosen in choices)

    cases = [case for case in content["cases"] if named(case)]
    if not cases:
        raise ValueError(f"{arguments.show} has no such cases")
    return {**content, "cases": cases}


def show(content: runs.Content, arguments: argparse.Namespace) -> None:
    if arguments.markdown:
        print(report.markdown(content))
    else:
        print(report.tables(content), report.summary(content), sep="\n\n")
    if content["left_out"]:
        print(f"Left out for lack of time: {len(content['left_out'])} cases", file=sys.stderr)
    if arguments.plots:
        from benchmarks import plots

        for path in plots.plot(content, arguments.plots, (arguments.show or arguments.output or Path("run")).stem):
            print(f"Written to {path}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 for a regression or a failure of ours, 130 after Ctrl-C; exits with 2 for bad input."""
    parser, arguments = parse_arguments(argv)
    if arguments.plots:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            parser.error("--plots needs matplotlib: pip install matplotlib")
    try:
        if arguments.goals:
            text, met = goals.report([runs.load(path) for path in arguments.goals])
            print(text)
            return 0 if met else 1
        if arguments.decide:
            print(decision.report(runs.load(arguments.decide)))
            return 0
        old = runs.load(arguments.compare) if arguments.compare else None
        content = _part(runs.load(arguments.show), arguments) if arguments.show else None
        if arguments.output:
            arguments.output.open("a").close()
    except (OSError, ValueError) as error:
        parser.error(str(error))

    finished = True
    if content is None:
        content = {
            "environment": {},
            "settings": {
                "rounds": arguments.rounds,
                "arguments": [Path(each).name for each in (sys.argv[1:] if argv is None else argv)],  # no paths
            },
            "ceilings": [],
            "cases": [],
            "left_out": [],
        }
        try:
            finished = measure_all(arguments, content)
        finally:  # also if a contestant is wrong
            if arguments.output:
                runs.save(content, arguments.output)
                print(f"Written to {arguments.output}", file=sys.stderr)
    show(content, arguments)
    if not finished:
        print("Interrupted: showing and writing what was measured so far.", file=sys.stderr)
        return 130
    failed = any("failed" in entry for case in content["cases"] for entry in case["contestants"].values())
    if old is None:
        return int(failed)
    for difference in differences(old, content):
        print(f"Warning: the environments differ. {difference}", file=sys.stderr)
    try:
        number, regressions = compare(old, content)
    except ValueError as error:
        parser.error(str(error))
    print(f"Compared with {arguments.compare}: {number} cases, {len(regressions)} slower beyond the spread")
    for regression in regressions:
        print(f"  {regression}")
    return 1 if regressions or failed else 0


if __name__ == "__main__":
    sys.exit(main())
