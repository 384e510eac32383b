"""Prunes a trained network in blocks, and shows on scikit-learn's handwritten digits whether that pays.

The hidden layer of a network 64 -> 1024 -> 1024 -> 10 is pruned gradually by PyTorch's own sparsifier
(torch.ao.pruning, with its cubic schedule) while the network trains on, in blocks of 16x1, 16x4 and 16x16 weights.
blockdiag.compress then makes the layer sparse, and it is fine-tuned. Accuracy on held-out digits and measured latency
are printed and plotted beside those of the dense network, of our other structures of as many parameters, trained on as
long, and of smaller dense networks trained from the start. Accuracies are means over several splits of the data.
"""

import argparse
import copy
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from does_it_pay import (
    HIDDEN_LAYER,
    METHODS,
    Data,
    Result,
    accuracy,
    costs,
    latencies,
    load_data,
    make_network,
    print_table,
    smaller_hidden,
    train,
)
from matplotlib import pyplot as plt
from torch import nn
from torch.ao.pruning import CubicSL, WeightNormSparsifier
from tqdm import tqdm

import blockdiag
from blockdiag.__main__ import report

BLOCKS = {"16x1": (16, 1), "16x4": (16, 4), "16x16": (16, 16)}
MARKERS = {
    **dict.fromkeys(BLOCKS, "o"),
    "16x4": "s",
    "16x16": "D",
    "blocks": "^",
    "low rank": "v",
    "smaller dense": "x",
}
LEARNING_RATE = 1e-3
CPU = torch.device("cpu")


def prune(dense: nn.Module, block: tuple[int, int], density: float, data: Data, epochs: int) -> tuple[nn.Module, float]:
    """The network with a sparse hidden layer after so many epochs, and its accuracy when it became sparse.

    Blocks of the smallest norm become zero, more of them in each epoch along the cubic schedule of Zhu and Gupta, "To
    prune, or not to prune" (2017), during two thirds of the epochs.
    """
    model = copy.deepcopy(dense)
    pruning = max(1, 2 * epochs // 3)
    sparsifier = WeightNormSparsifier(1 - density, sparse_block_shape=block, zeros_per_block=math.prod(block))
    sparsifier.prepare(model, [{"tensor_fqn": f"{HIDDEN_LAYER}.weight"}])
    schedule = CubicSL(sparsifier, init_t=0, delta_t=1, total_t=pruning)
    for _ in range(pruning):
        train(model, data, 1, LEARNING_RATE)
        sparsifier.step()
        schedule.step()
    sparsifier.step()
    sparsifier.squash_mask()
    sparse, _ = blockdiag.compress(model, blockdiag.BlockSparse(block, density), HIDDEN_LAYER, progress=False)
    before = accuracy(sparse, data)
    train(sparse, data, max(1, epochs - pruning), LEARNING_RATE)
    return sparse, before


def other(method: str, dense: nn.Module, density: float, data: Data, arguments: argparse.Namespace) -> nn.Module:
    """A network with as many parameters, trained as long in all."""
    if method == "smaller dense":
        weights = dense[int(HIDDEN_LAYER)].weight.numel()
        model = make_network(smaller_hidden(costs(dense)[0] - round((1 - density) * weights)), CPU)
        train(model, data, arguments.epochs + arguments.fine_tuning, 3e-3)
        return model
    calibration = [data.train_images]
    model, _ = blockdiag.compress(
        dense, METHODS[method], HIDDEN_LAYER, budget=density, calibration=calibration, progress=False
    )
    train(model, data, arguments.fine_tuning, LEARNING_RATE)
    return model


def study(arguments: argparse.Namespace) -> list[Result]:
    """The dense network first, then all others."""
    models: dict[tuple[str, float], nn.Module] = {}
    accuracies: dict[tuple[str, float], list[float]] = {}
    before: dict[tuple[str, float], list[float]] = {}
    cases = [(method, density) for density in arguments.densities for method in MARKERS]
    progress = tqdm(total=arguments.splits * (1 + len(cases)), unit="network")
    for split in range(arguments.splits):
        data = load_data(split, CPU)
        torch.manual_seed(split)
        dense = make_network(arguments.hidden, CPU)
        train(dense, data, arguments.epochs, 3e-3)
        models["dense", 1.0] = dense
        accuracies.setdefault(("dense", 1.0), []).append(accuracy(dense, data))
        progress.update()
        for case in cases:
            method, density = case
            if method in BLOCKS:
                models[case], when_pruned = prune(dense, BLOCKS[method], density, data, arguments.fine_tuning)
                before.setdefault(case, []).append(when_pruned)
            else:
                models[case] = other(method, dense, density, data, arguments)
            accuracies.setdefault(case, []).append(accuracy(models[case], data))
            progress.update()
    progress.close()
    times = latencies(list(models.values()), (1, 128), data.test_images, arguments.rounds)
    results = []
    for (case, model), milliseconds in zip(models.items(), times, strict=True):
        after = accuracies[case]
        converted = statistics.mean(before[case]) if case in before else None
        results.append(
            Result(case[0], *costs(model), converted, statistics.mean(after), statistics.pstdev(after), milliseconds)
        )
    return results


def conclude(results: list[Result], tolerance: float) -> str:
    """For each batch size the fastest sparse network that is about as accurate as the dense one, and the fastest."""
    dense, good = results[0], [r for r in results[1:] if r.accuracy >= results[0].accuracy - tolerance]
    lines = []
    for size in dense.milliseconds:
        ranked = sorted(good, key=lambda r: r.milliseconds[size])
        sparse = [r for r in ranked if r.method in BLOCKS]
        if not sparse:
            lines.append(f"batch {size}: no sparse network is within {100 * tolerance:.1f} points of the dense one")
            continue
        chosen = [sparse[0]] if ranked[0] is sparse[0] else [sparse[0], ranked[0]]
        texts = [
            f"{r.method} with {100 * r.parameters / dense.parameters:.0f}% of the parameters runs "
            f"{dense.milliseconds[size] / r.milliseconds[size]:.2f} times as fast at "
            f"{100 * (r.accuracy - dense.accuracy):+.2f} points"
            for r in chosen
        ]
        lines.append(f"batch {size}: " + "; the fastest of all: ".join(texts))
    return "\n".join(lines)


def plot(path: Path, results: list[Result]) -> None:
    dense = results[0]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for side, size in zip(axes, dense.milliseconds, strict=True):
        side.axhline(100 * dense.accuracy, color="0.8", linewidth=1, zorder=0)
        side.errorbar(
            1, 100 * dense.accuracy, 100 * dense.deviation, marker="*", color="k", markersize=12, label="dense"
        )
        for method, marker in MARKERS.items():
            chosen = [r for r in results if r.method == method]
            speed = [dense.milliseconds[size] / r.milliseconds[size] for r in chosen]
            heights, bars = [100 * r.accuracy for r in chosen], [100 * r.deviation for r in chosen]
            side.errorbar(speed, heights, bars, marker=marker, linestyle=":", linewidth=1, capsize=2, label=method)
        side.set(xlabel=f"times as fast as the dense network, batch {size}", xlim=(0, None))
        side.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="accuracy on held-out digits (%)")
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(min(low, 97.0), max(high, 99.5))  # smaller differences are chance
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False)
    figure.suptitle(
        "A network's hidden layer pruned in blocks, and other ways to make it smaller (bars: spread of the splits)"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--hidden", type=int, default=1024, help="width of the network, a multiple of 16 (default: %(default)s)")
    add("--densities", type=float, nargs="+", default=[0.1, 0.2], help="what is kept (default: %(default)s)")
    add("--epochs", type=int, default=20, help="of training (default: %(default)s)")
    add("--fine-tuning", type=int, default=15, help="epochs of pruning and fine-tuning (default: %(default)s)")
    add("--splits", type=int, default=3, help="of the data, to average over (default: %(default)s)")
    add("--rounds", type=int, default=50, help="of timing (default: %(default)s)")
    add("--output", type=Path, default=Path("demo-output/prune_blocks.png"), help="the plot (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    results = study(arguments)
    print_table(results)
    print(f"\n{conclude(results, tolerance=0.003)}")
    plot(arguments.output, results)
    settings = {key: value for key, value in vars(arguments).items() if key != "output"}
    numbers = {"environment": report(), "settings": settings, "results": [result._asdict() for result in results]}
    numbers["environment"].pop("installed", None)  # a path of this machine
    arguments.output.with_suffix(".json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"\nPlot: {arguments.output}\nNumbers: {arguments.output.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
