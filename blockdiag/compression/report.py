"""What a conversion did to each layer, and whether it pays."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockdiag._surgery.duplicate import duplicate, route_calls


class Cost(NamedTuple):
    """Of a layer: its parameters, floating-point operations for each row of its output (a position of a convolution's,
    two for a multiplication and addition), bytes of parameters, and measured seconds for a call, if measured. Shared
    parameters count for the first layer that has them."""

    parameters: int
    operations: int
    bytes: int
    seconds: float | None


class Step(NamedTuple):
    """One step towards the converted layer, and the relative error after it."""

    name: str
    error: float


@dataclass
class LayerReport:
    """One layer: what it was, what it is, and what that costs.

    ``steps`` gives the relative error after each step of the projection, the last that of the layer as it is now: root
    mean square of the difference in output, relative to that of the dense layer's output without bias, on the
    calibration inputs; without any on white noise, which is the weight's error in the Frobenius norm. ``calibrated``
    says which.
    """

    name: str
    before: str
    after: str
    cost_before: Cost
    cost_after: Cost
    steps: list[Step]
    calibrated: bool

    @property
    def error(self) -> float:
        return self.steps[-1].error

    def multiplied_out(self) -> None:
        """Says that the new layer's weight is read, and the layer never called: that saves no operations."""
        self.after += ", multiplied out"
        self.cost_before = self.cost_before._replace(seconds=None)
        self.cost_after = self.cost_after._replace(operations=self.cost_before.operations, seconds=None)

    def errors(self) -> str:
        """The errors after all steps, in words for a table."""
        return " > ".join(f"{step.error:.3f}" for step in self.steps) + ("" if self.calibrated else " (weight)")


@dataclass
class CompressionReport:
    """All layers of a conversion. ``str(report)`` is a table, ``report.as_dict()`` is for JSON.

    ``skipped`` maps the names of layers that were left alone to the reason.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def total(self, which: str) -> Cost:
        """The sum over the layers; ``which`` is ``"cost_before"`` or ``"cost_after"``."""
        costs: list[Cost] = [getattr(layer, which) for layer in self.layers]
        times = [cost.seconds for cost in costs if cost.seconds is not None]
        return Cost(
            sum(cost.parameters for cost in costs),
            sum(cost.operations for cost in costs),
            sum(cost.bytes for cost in costs),
            sum(times) if times else None,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self, dict_factory=dict)

    def __str__(self) -> str:
        header = ["layer", "before", "after", "parameters", "operations", "bytes", "time", "error"]
        rows = [
            [layer.name, layer.before, layer.after, *_compare(layer.cost_before, layer.cost_after), layer.errors()]
            for layer in self.layers
        ]
        total = ["total", "", "", *_compare(self.total("cost_before"), self.total("cost_after")), ""]
        widths = [max(len(row[i]) for row in [header, *rows, total]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, ["-" * width for width in widths], *rows, total]
        ]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def _compare(before: Cost, after: Cost) -> list[str]:
    cells = [
        f"{old:,} > {new:,} ({new / old:.2f})" if old else f"{old:,} > {new:,}"
        for old, new in zip(before[:3], after[:3], strict=True)
    ]
    if before.seconds is None or after.seconds is None:
        return [*cells, "-"]
    return [
        *cells,
        f"{1e6 * before.seconds:.1f} > {1e6 * after.seconds:.1f} us ({after.seconds / before.seconds:.2f})",
    ]


def cost(layer: nn.Module, seconds: float | None, counted: set[nn.Parameter]) -> Cost:
    """What the layer costs; a weight of a linear layer or convolution is used once for each row of output.

    Parameters that are `counted` already, of another layer that shares them, are not again.
    """
    parameters = list(layer.parameters())
    own = [p for p in parameters if p not in counted]
    counted.update(own)
    return Cost(
        sum(p.numel() for p in own),
        2 * sum(p.numel() for p in parameters if p.dim() > 1),
        sum(p.numel() * p.element_size() for p in own),
        seconds,
    )


def describe(layer: Any) -> str:
    """The layer's type and sizes in one line."""
    name = type(layer).__name__.removeprefix("NonDynamicallyQuantizable")
    if hasattr(layer, "num_blocks"):
        blocks = layer.num_blocks
        name += f"[{'x'.join(map(str, blocks)) if isinstance(blocks, tuple) else blocks} blocks]"
    if hasattr(layer, "rank"):
        name += f"[rank {layer.rank}]"
    if hasattr(layer, "in_features"):
        return f"{name} {layer.in_features}→{layer.out_features}"
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    kernel = "x".join(map(str, layer.weight.shape[2:]))
    return f"{name} {layer.in_channels}→{layer.out_channels}, {kernel}{groups}"


def measure_pair(before: nn.Module, after: nn.Module, shape: Sequence[int], rounds: int = 30) -> tuple[float, float]:
    """Median seconds of a forward pass of each on random input, without gradients, called in turn, round by round.

    The first rounds, in which memory and kernels are set up, are left out.
    """
    parameter = next(before.parameters())
    generator = torch.Generator(parameter.device).manual_seed(0)  # its own: the user's goes on as it is
    input = torch.randn(shape, device=parameter.device, dtype=parameter.dtype, generator=generator)
    # Without hooks, which may be the user's and are not to see this: those of the parts of a layer are left out.
    before, after = (duplicate(layer, hooks=False) for layer in (before, after))
    for layer in (before, after):
        route_calls(layer)
    seconds: dict[nn.Module, list[float]] = {before: [], after: []}
    with torch.no_grad():
        for round in range(rounds + 3):
            for layer in (before, after) if round % 2 == 0 else (after, before):
                _synchronize(input)
                start = time.perf_counter()
                layer.forward(input)
                _synchronize(input)
                if round >= 3:
                    seconds[layer].append(time.perf_counter() - start)
    return statistics.median(seconds[before]), statistics.median(seconds[after])


def _synchronize(tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        torch.accelerator.synchronize(tensor.device)
