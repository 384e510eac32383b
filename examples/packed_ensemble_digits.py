"""Trains an ensemble of classifiers at once, as one packed network, on scikit-learn's handwritten digits.

Every layer of the packed network is one BlockDiagLinear with a block per member. So one forward and one backward pass
train all members, each on its own shuffle of the data. For comparison the same ensemble is trained as a loop over
networks of nn.Linear, from the same initial parameters on the same batches, in alternating epochs. Both must compute
the same function, and their times are compared. Prints accuracy, negative log likelihood (NLL) and expected calibration
error (ECE) of the members and of the ensemble on held-out digits, and plots the ensemble's reliability diagram and the
times.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from blockdiag import BlockDiagLinear

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PIXELS, CLASSES = 64, 10
REQUIRED_ACCURACY = 0.97


class PackedEnsemble(nn.Module):
    """`members` networks PIXELS -> hidden -> hidden -> CLASSES, side by side."""

    def __init__(self, members: int, hidden: int) -> None:
        super().__init__()
        self.members = members
        sizes = [PIXELS, hidden, hidden, CLASSES]
        self.layers = nn.ModuleList(
            BlockDiagLinear(members * fan_in, members * fan_out, members)
            for fan_in, fan_out in itertools.pairwise(sizes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (batch, members, PIXELS), a stacked input, to logits (batch, members, CLASSES)."""
        for layer in self.layers[:-1]:
            images = F.relu(layer(images))
        return self.layers[-1](images)


class LoopEnsemble(nn.Module):
    """The same ensemble as one network of nn.Linear for each member."""

    def __init__(self, packed: PackedEnsemble) -> None:
        super().__init__()
        by_layer = [layer.to_linears() for layer in packed.layers]
        self.networks = nn.ModuleList(
            nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
            for first, second, third in zip(*by_layer, strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(x) for network, x in zip(self.networks, images.unbind(1), strict=True)], dim=1)


def load_data(seed: int) -> list[Tensor]:
    """Train images (samples, PIXELS) from 0 to 1, test images, train labels (samples,), test labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, stratify=labels, random_state=seed)
    return [
        torch.tensor(part, dtype=dtype)
        for part, dtype in zip(split, 2 * [torch.float32] + 2 * [torch.long], strict=True)
    ]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the members' losses, so that each member gets the gradient that it would get alone."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / len(labels)


class Trainer:
    """One ensemble, its optimizer, and the times of its epochs."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=1e-2)
        self.seconds: list[float] = []

    def run_epoch(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        """One pass over images (samples, members, PIXELS) and labels (samples, members), in their order."""
        synchronize(images.device)
        start = time.perf_counter()
        for batch_images, batch_labels in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            self.optimizer.zero_grad(set_to_none=True)
            loss_of(self.model(batch_images), batch_labels).backward()
            self.optimizer.step()
        synchronize(images.device)
        self.seconds.append(time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def calibration(probabilities: Tensor, labels: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor, float]:
    """Confidence, accuracy and share of the samples in each of `bins` equal bins of confidence, and the ECE.

    The expected calibration error is the mean of |accuracy - confidence| over the bins, weighted by their share
    (Guo et al., On Calibration of Modern Neural Networks, 2017). Empty bins are NaN and do not count.
    """
    confidence, predicted = probabilities.max(dim=-1)
    index = (confidence * bins).long().clamp(max=bins - 1)
    count = torch.zeros(bins, dtype=torch.float64).index_add(0, index, torch.ones(len(labels), dtype=torch.float64))
    mean_confidence = torch.zeros_like(count).index_add(0, index, confidence.double()) / count
    accuracy = torch.zeros_like(count).index_add(0, index, (predicted == labels).double()) / count
    share = count / len(labels)
    error = (share * (accuracy - mean_confidence).abs()).nansum().item()
    return mean_confidence, accuracy, share, error


def scores(probabilities: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Accuracy, NLL (nats) and ECE of predicted class probabilities (samples, classes)."""
    accuracy = (probabilities.argmax(-1) == labels).double().mean().item()
    nll = F.nll_loss(probabilities.double().log(), labels).item()
    return accuracy, nll, calibration(probabilities, labels)[3]


def plot(path: Path, probabilities: Tensor, labels: Tensor, packed: Trainer, loop: Trainer, subtitle: str) -> None:
    figure, (reliability, speed) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    confidence, accuracy, share, error = calibration(probabilities, labels)
    reliability.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfectly calibrated")
    seen = share > 0
    reliability.plot(confidence[seen], accuracy[seen], color="tab:blue", marker="o", label="ensemble", clip_on=False)
    for x, y, count in zip(confidence[seen], accuracy[seen], (share[seen] * len(labels)).round().int(), strict=True):
        reliability.annotate(str(count.item()), (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    reliability.set(
        xlim=(0, 1.05),
        ylim=(0, 1.08),
        xlabel="confidence",
        ylabel="accuracy",
        title=f"Reliability on held-out digits (ECE {100 * error:.1f} %)",
    )
    reliability.legend(loc="lower right", title="numbers: digits in the bin", alignment="left", frameon=False)

    names, times = (
        ["loop of nn.Linear", "BlockDiagLinear"],
        [1e3 * statistics.median(t.seconds) for t in (loop, packed)],
    )
    bars = speed.barh(names, times, color=["0.7", "tab:blue"])
    speed.bar_label(bars, labels=[f"{t:.1f} ms" for t in times], padding=4)
    speed.set(
        xlim=(0, 1.2 * max(times)),
        xlabel="time of one training epoch (ms, median)",
        title=f"{times[0] / times[1]:.1f} times as fast as the loop",
    )
    for axes in (reliability, speed):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(subtitle)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--members", type=int, default=8, help="classifiers in the ensemble (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden units of each member (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="default: %(default)s")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.2,
        help="noise added to training pixels, which are 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo-output/packed_ensemble.png"),
        help="the plot; the trained ensemble goes next to it, as .pt (default: %(default)s)",
    )
    arguments = parser.parse_args()
    for name in ("members", "hidden", "epochs", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    torch.manual_seed(arguments.seed)
    train_images, test_images, train_labels, test_labels = (part.to(device) for part in load_data(arguments.seed))
    print(
        f"{len(train_labels)} digits to train on, {len(test_labels)} to test on, {arguments.members} members, {device}"
    )

    packed_model = PackedEnsemble(arguments.members, arguments.hidden).to(device)
    loop_model = LoopEnsemble(packed_model)
    # All members see the same test images: expanded, not copied.
    test_images = test_images.unsqueeze(1).expand(-1, arguments.members, -1)
    with torch.no_grad():
        torch.testing.assert_close(packed_model(test_images), loop_model(test_images))
    packed, loop = (Trainer(model, arguments.learning_rate) for model in (packed_model, loop_model))
    shape = (len(train_labels), arguments.members)
    progress = tqdm(range(arguments.epochs), desc="training", unit="epoch", mininterval=0.5)
    for epoch in progress:
        order = torch.rand(shape, device=device).argsort(0)  # a shuffle for each member
        epoch_images = train_images[order] + arguments.noise * torch.randn(*shape, PIXELS, device=device)
        # Alternating, so that a machine that slows down affects both alike.
        for trainer in (packed, loop) if epoch % 2 == 0 else (loop, packed):
            trainer.run_epoch(epoch_images, train_labels[order], arguments.batch_size)
        progress.set_postfix(
            speedup=f"{statistics.median(loop.seconds) / statistics.median(packed.seconds):.1f}x", refresh=False
        )

    with torch.no_grad():
        members = packed_model(test_images).softmax(-1).cpu()
        loop_members = loop_model(test_images).softmax(-1).cpu()
    labels = test_labels.cpu()
    ensemble = members.mean(1)

    print(f"\n{'':12}{'accuracy':>10}{'NLL':>10}{'ECE':>10}")
    rows = [(f"member {index + 1}", scores(members[:, index], labels)) for index in range(arguments.members)]
    average = tuple(statistics.mean(row[1][column] for row in rows) for column in range(3))
    rows += [("average", average), ("ensemble", scores(ensemble, labels))]
    for name, (accuracy, nll, ece) in rows:
        print(f"{name:12}{100 * accuracy:9.2f}%{nll:10.4f}{100 * ece:9.2f}%")

    loop_accuracy = scores(loop_members.mean(1), labels)[0]
    agreement = (members.argmax(-1) == loop_members.argmax(-1)).double().mean().item()
    loop_time, packed_time = statistics.median(loop.seconds), statistics.median(packed.seconds)
    print(
        "\nAs a loop of nn.Linear: the same outputs before training (checked); after it, "
        f"{100 * agreement:.1f}% of the members' predictions the same, and an ensemble accuracy of "
        f"{100 * loop_accuracy:.2f}%.\n"
        f"Training: {1e3 * packed_time:.1f} ms an epoch packed, {1e3 * loop_time:.1f} ms as a loop: "
        f"{loop_time / packed_time:.1f} times as fast (medians of {arguments.epochs} epochs run in turn)."
    )
    subtitle = f"{arguments.members} classifiers as one packed network, on {device}"
    plot(arguments.output, ensemble, labels, packed, loop, subtitle)
    print(f"Plot: {arguments.output}")
    settings = {name: getattr(arguments, name) for name in ("members", "hidden", "seed")}
    torch.save({**settings, "state_dict": packed_model.state_dict()}, arguments.output.with_suffix(".pt"))
    print(f"Trained ensemble: {arguments.output.with_suffix('.pt')}")

    accuracy = rows[-1][1][0]
    if accuracy < REQUIRED_ACCURACY or accuracy <= average[0]:
        print(f"The ensemble should reach {100 * REQUIRED_ACCURACY:.0f}% and beat its average member.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
