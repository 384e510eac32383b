"""Times the contestants over a table of problems, and writes the medians with the environment as JSON."""

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.contestants import CONTESTANTS
from benchmarks.timing import Problem, capture, make_steps, measure
from blockdiag.__main__ import report

PROBLEMS = {
    "cpu": [
        Problem(128, 1, 256, 256),
        Problem(128, 4, 64, 64),
        Problem(128, 16, 64, 64),
        Problem(128, 16, 256, 256),
        Problem(128, 32, 32, 32),
        Problem(2048, 32, 32, 32),
    ],
    "cuda": [
        Problem(128, 1, 1024, 1024),
        *(Problem(128, 16, size, size) for size in (64, 256, 1024)),
        Problem(128, 4, 512, 512),
        Problem(128, 32, 32, 32),
        Problem(2048, 32, 32, 32),
        Problem(2560, 12, 1024, 3072),
    ],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = {"cpu": ["eager"], "cuda": ["eager", "graph"]}


def commit() -> str:
    """The commit that is measured: from $BLOCKDIAG_COMMIT in a copy without its history."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or os.environ.get("BLOCKDIAG_COMMIT", "unknown")


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=PROBLEMS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each problem (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    names = list(CONTESTANTS)
    cases = [
        (problem, dtype, backward)
        for dtype in arguments.dtypes
        for problem in PROBLEMS[arguments.device]
        for backward in (False, True)
    ]
    results = []
    for problem, dtype, backward in tqdm(cases, desc="problems", mininterval=1):
        steps = make_steps(names, problem, DTYPES[dtype], device, backward)
        for mode in MODES[arguments.device]:
            timed = steps if mode == "eager" else {name: capture(step) for name, step in steps.items()}
            case = {
                "problem": problem._asdict(),
                "dtype": dtype,
                "pass": "fwd+bwd" if backward else "fwd",
                "mode": mode,
            }
            results.append({**case, "times": measure(timed, arguments.rounds, device)})

    print(f"\nMicroseconds (medians of {arguments.rounds} interleaved rounds), and the loop's time over ours.")
    print(
        f"{'dtype':9}{'B, G, K->N':22}{'pass':9}{'mode':7}"
        + "".join(f"{name:>10}" for name in names)
        + f"{'loop/ours':>11}"
    )
    for result in results:
        times = [result["times"][name]["median_us"] for name in names]
        ratio = times[names.index("loop")] / times[names.index("ours")]
        print(
            f"{result['dtype']:9}{Problem(**result['problem'])!s:22}{result['pass']:9}{result['mode']:7}"
            + "".join(f"{time:10.1f}" for time in times)
            + f"{ratio:11.2f}"
        )
    if arguments.output is not None:
        environment = {**report(), "commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        if device.type == "cuda":
            environment["driver"] = driver()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment, "rounds": arguments.rounds, "results": results}
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")
        print(f"Written to {arguments.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
