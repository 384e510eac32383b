"""Compresses a trained dense network in three ways, and shows on scikit-learn's handwritten digits whether that pays.

A network PIXELS -> hidden -> hidden -> CLASSES is trained; its hidden layer is then compressed (blockdiag.compress) to
permuted diagonal blocks, to a low-rank and to a Monarch product, each fitted to the training images and fine-tuned
briefly, at several budgets of parameters. Accuracy on held-out digits, parameters, FLOPs and measured latency are
printed and plotted beside the dense network's, and beside those of smaller dense networks of the same budgets trained
from scratch: the baseline to beat. Once for a wide network, and once for a narrow one. Accuracies are means over
several splits of the data.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import blockdiag
from blockdiag.__main__ import report
from blockdiag.compression.monarch import near_square_blocks

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PIXELS, CLASSES = 64, 10
HIDDEN_LAYER = "2"
BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
METHODS = {
    "blocks": blockdiag.BlockDiagonal(permute=True),
    "low rank": blockdiag.LowRank(min_features=0),
    "Monarch": blockdiag.Monarch(min_features=0),
}
MARKERS = {"dense": "*", "blocks": "o", "low rank": "s", "Monarch": "^", "smaller dense": "x"}


class Data(NamedTuple):
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    """One network: its costs and its accuracy. `converted` is the accuracy before fine-tuning.

    Accuracies are means over the splits of the data, `deviation` is the standard deviation among them.
    """

    method: str
    parameters: int
    operations: int
    converted: float | None
    accuracy: float
    deviation: float
    milliseconds: dict[int, float]  # by batch size


def load_data(split: int, device: torch.device) -> Data:
    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(images / 16, labels, test_size=0.25, stratify=labels, random_state=split)
    tensors = (torch.tensor(part, device=device) for part in (x, y, x_test, y_test))
    return Data(*(t.float() if t.is_floating_point() else t for t in tensors))


def make_network(hidden: int, device: torch.device) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES)
    ).to(device)


def train(model: nn.Module, data: Data, epochs: int, learning_rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
    batches = -(-len(data.train_labels) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    for _ in range(epochs):
        for index in torch.randperm(len(data.train_labels), device=data.train_labels.device).split(128):
            images = data.train_images[index] + 0.2 * torch.randn_like(data.train_images[index])
            optimizer.zero_grad()
            F.cross_entropy(model(images), data.train_labels[index]).backward()
            optimizer.step()
            schedule.step()


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return (model(data.test_images).argmax(-1) == data.test_labels).double().mean().item()


def costs(model: nn.Module) -> tuple[int, int]:
    """Parameters, and FLOPs for one image: two per weight, as each is used once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), 2 * sum(p.numel() for p in parameters if p.dim() > 1)


def latencies(
    models: list[nn.Module], batch_sizes: tuple[int, ...], images: Tensor, rounds: int
) -> list[dict[int, float]]:
    """Median milliseconds of each model's forward pass, all models in turn, round by round."""
    seconds: list[dict[int, list[float]]] = [{size: [] for size in batch_sizes} for _ in models]
    with torch.inference_mode():
        for round in range(rounds + 5):
            for size in batch_sizes:
                for model, times in zip(models, seconds, strict=True):
                    synchronize(images.device)
                    start = time.perf_counter()
                    model(images[:size])
                    synchronize(images.device)
                    if round >= 5:
                        times[size].append(time.perf_counter() - start)
    return [{size: 1e3 * statistics.median(t) for size, t in times.items()} for times in seconds]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def smaller_hidden(parameters: int) -> int:
    """The width of a network with about this many parameters."""
    per_unit = PIXELS + CLASSES + 2
    return max(1, round((-per_unit + (per_unit**2 + 4 * (parameters - CLASSES)) ** 0.5) / 2))


def budgets(method: str, hidden: int) -> list[float]:
    """The budgets that a method can meet: Monarch's factors have a smallest size, as their blocks are limited."""
    least = 2 * near_square_blocks(hidden) / hidden if method == "Monarch" else 0.0
    return [budget for budget in BUDGETS if budget >= least]


def study(hidden: int, arguments: argparse.Namespace, device: torch.device) -> list[Result]:
    """The dense network first, then all others."""
    accuracies: dict[tuple[str, float], list[tuple[float | None, float]]] = {}
    models: dict[tuple[str, float], nn.Module] = {}
    cases = [(method, budget) for method in (*METHODS, "smaller dense") for budget in budgets(method, hidden)]
    progress = tqdm(total=arguments.splits * (1 + len(cases)), desc=f"{hidden} hidden units", unit="network")
    for split in range(arguments.splits):
        data = load_data(split, device)
        torch.manual_seed(split)
        dense = make_network(hidden, device)
        train(dense, data, arguments.epochs, 3e-3)
        models["dense", 1.0] = dense
        accuracies.setdefault(("dense", 1.0), []).append((None, accuracy(dense, data)))
        progress.update()
        for method, budget in cases:
            before = None
            if method == "smaller dense":
                weights = hidden * hidden
                model = make_network(smaller_hidden(costs(dense)[0] - round((1 - budget) * weights)), device)
                train(model, data, arguments.epochs + arguments.fine_tuning, 3e-3)
            else:
                images = [data.train_images]
                model, conversion = blockdiag.compress(
                    dense, METHODS[method], HIDDEN_LAYER, budget=budget, calibration=images, progress=False
                )
                if split == 0 and budget == BUDGETS[1]:
                    tqdm.write(f"\n{method}, {budget:g} of the hidden layer:\n{conversion}")
                before = accuracy(model, data)
                train(model, data, arguments.fine_tuning, 1e-3)
            models[method, budget] = model
            accuracies.setdefault((method, budget), []).append((before, accuracy(model, data)))
            progress.update()
    progress.close()
    times = latencies(list(models.values()), (1, 128), data.test_images, arguments.rounds)
    results = []
    for (case, model), milliseconds in zip(models.items(), times, strict=True):
        before, after = zip(*accuracies[case], strict=True)
        converted = None if before[0] is None else statistics.mean(before)
        deviation = statistics.pstdev(after)
        results.append(Result(case[0], *costs(model), converted, statistics.mean(after), deviation, milliseconds))
    return results


def print_table(results: list[Result]) -> None:
    dense = results[0]
    columns = f"{'parameters':>12}{'operations':>12}{'converted':>11}{'fine-tuned':>19}{'ms, batch 1':>18}{'128':>16}"
    print(f"\n{'':14}{columns}")
    for r in results:
        converted = "" if r.converted is None else f"{100 * r.converted:.2f}%"
        speed = "".join(
            f"{ms:{width}.3f} ({dense.milliseconds[size] / ms:4.2f}x)" for (size, ms), width in
            zip(r.milliseconds.items(), (10, 8), strict=True)
        )  # fmt: skip
        tuned = f"{100 * r.accuracy:.2f}% ±{100 * r.deviation:.2f}"
        print(f"{r.method:14}{r.parameters:12,}{r.operations:12,}{converted:>11}{tuned:>19}{speed}")


def conclude(results: list[Result], tolerance: float) -> str:
    """Whether a converted network is faster than the dense one without being worse.

    By at least 20 %, and unless a smaller dense network, trained from scratch, is both faster and better.
    """
    dense, others = results[0], results[1:]
    good = [r for r in others if r.accuracy >= dense.accuracy - tolerance]
    lines = []
    for size in dense.milliseconds:
        converted = [r for r in good if r.method in METHODS]
        smaller = [r for r in good if r.method == "smaller dense"]
        if not converted:
            lines.append(f"batch {size}: no conversion is within {100 * tolerance:.1f} points of the dense network")
            continue
        best = min(converted, key=lambda r: r.milliseconds[size])
        speedup = dense.milliseconds[size] / best.milliseconds[size]
        rival = min(smaller, key=lambda r: r.milliseconds[size], default=None)
        beaten = rival and rival.milliseconds[size] < best.milliseconds[size] and rival.accuracy >= best.accuracy
        verdict = "pays" if speedup >= 1.2 and not beaten else "does not pay"
        text = (
            f"batch {size}: {verdict}: {best.method} with {100 * best.parameters / dense.parameters:.0f}% of the "
            f"parameters runs {speedup:.2f} times as fast at {100 * (best.accuracy - dense.accuracy):+.2f} points"
        )
        if rival:
            text += (
                f"; a smaller dense network trained from the start ({100 * rival.parameters / dense.parameters:.0f}%) "
                f"{dense.milliseconds[size] / rival.milliseconds[size]:.2f} times at "
                f"{100 * (rival.accuracy - dense.accuracy):+.2f}"
            )
        lines.append(text)
    return "\n".join(lines)


def plot(path: Path, studies: dict[int, list[Result]], device: torch.device) -> None:
    figure, axes = plt.subplots(len(studies), 2, figsize=(11, 4.2 * len(studies)), layout="constrained", squeeze=False)
    for row, (hidden, results) in zip(axes, studies.items(), strict=True):
        dense = results[0]
        sides = (
            ("parameters, % of the dense network's", lambda r, dense=dense: 100 * r.parameters / dense.parameters),
            (
                "times as fast as the dense network, batch 128",
                lambda r, dense=dense: dense.milliseconds[128] / r.milliseconds[128],
            ),
        )
        lowest = min(r.accuracy - r.deviation for r in results)
        for side, (label, position) in zip(row, sides, strict=True):
            side.axhline(100 * dense.accuracy, color="0.8", linewidth=1, zorder=0)
            for method, marker in MARKERS.items():
                chosen = [r for r in results if r.method == method]
                style = {"color": "black", "markersize": 12} if method == "dense" else {}
                side.errorbar(
                    [position(r) for r in chosen],
                    [100 * r.accuracy for r in chosen],
                    [100 * r.deviation for r in chosen],
                    marker=marker,
                    linestyle=":",
                    linewidth=1,
                    capsize=2,
                    label=method,
                    **style,
                )
            # At least four points high: smaller differences are chance.
            side.set_ylim(min(100 * lowest - 0.5, 97.0), 100)
            side.set_xlim(left=0)
            side.set(xlabel=label, ylabel="accuracy on held-out digits (%)", title=f"{hidden} hidden units")
            side.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(
        f"A dense network's hidden layer converted and fine-tuned, on {device} (bars: spread of the splits)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=[1024, 64], help="widths of the networks (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=20, help="of training (default: %(default)s)")
    parser.add_argument("--fine-tuning", type=int, default=10, help="epochs after conversion (default: %(default)s)")
    parser.add_argument("--splits", type=int, default=3, help="of the data, to average over (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=50, help="of timing (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/does_it_pay.png"),
        help="the plot; the numbers go next to it, as .json (default: %(default)s)",
    )
    arguments = parser.parse_args()
    for name in ("epochs", "fine_tuning", "splits", "rounds"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(arguments.hidden) < 16 or any(hidden % 16 for hidden in arguments.hidden):
        parser.error("--hidden must be multiples of 16, the number of blocks of the smallest budget")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    studies = {hidden: study(hidden, arguments, device) for hidden in arguments.hidden}
    for hidden, results in studies.items():
        print_table(results)
        print(f"\n{hidden} hidden units, {device}:\n{conclude(results, tolerance=0.003)}")
    plot(arguments.output, studies, device)
    numbers = {
        "environment": report(),
        "settings": {
            name: getattr(arguments, name) for name in ("epochs", "fine_tuning", "splits", "rounds", "device")
        },
        "studies": {hidden: [result._asdict() for result in results] for hidden, results in studies.items()},
    }
    arguments.output.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\nPlot: {arguments.output}\nNumbers: {arguments.output.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
