"""What compression did to each layer, and what that saves."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from blockdiag._surgery.duplicate import duplicate, route_calls


class Cost(NamedTuple):
    """What a layer costs.

    Attributes:
        parameters: number of parameters. Shared ones count for the first layer that has them.
        operations: FLOPs for each row of the output, or position of a convolution's output: two for each weight.
        bytes: of the parameters.
        seconds: median time of a call, if measured.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> _, report = blockdiag.compress(model, blockdiag.BlockDiagonal(4), dry_run=True, progress=False)
        >>> report.layers[0].cost_before
        Cost(parameters=4160, operations=8192, bytes=16640, seconds=None)
    """

    parameters: int
    operations: int
    bytes: int
    seconds: float | None


class Step(NamedTuple):
    """A step of the projection, and the relative error after it.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> inputs = torch.randn(500, 64)
        >>> _, report = blockdiag.compress(
        ...     model, blockdiag.BlockDiagonal(4), calibration=[inputs], dry_run=True, progress=False
        ... )
        >>> [step.name for step in report.layers[0].steps]
        ['diagonal blocks', 'refitted']
    """

    name: str
    error: float


@dataclass
class LayerReport:
    """A layer before and after compression, with the error.

    Attributes:
        name: of the layer in the model.
        before: class and sizes of the old layer, ``after`` of the new one.
        cost_before: a :class:`Cost`, as ``cost_after``.
        steps: the relative errors after each step of the projection. A relative error is the root mean square of the
            difference in output, divided by that of the dense layer's output without bias, on the calibration inputs;
            without any on white noise, which is the weight's error in the Frobenius norm.
        calibrated: whether there were calibration inputs.
        error: the last of these errors, that of the new layer.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> torch.nn.init.eye_(model[0].weight)  # doctest: +ELLIPSIS
        Parameter containing:...
        >>> _, report = blockdiag.compress(model, blockdiag.BlockDiagonal(4), dry_run=True, progress=False)
        >>> report.layers[0].name, report.layers[0].after, report.layers[0].error
        ('0', 'BlockDiagLinear[4 blocks] 64→64', 0.0)
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
        """Notes that the layer's weight is read and the layer never called, so that no operations are saved."""
        self.after += ", multiplied out"
        self.cost_before = self.cost_before._replace(seconds=None)
        self.cost_after = self.cost_after._replace(operations=self.cost_before.operations, seconds=None)

    def errors(self) -> str:
        """The errors after all steps, for a table."""
        return " > ".join(f"{step.error:.3f}" for step in self.steps) + ("" if self.calibrated else " (weight)")


@dataclass
class CompressionReport:
    """All layers that were compressed. ``str(report)`` is a table, ``report.as_dict()`` is for JSON.

    Attributes:
        layers: a :class:`LayerReport` for each.
        skipped: by name of each layer that was left alone the reason.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False), torch.nn.Linear(64, 8))
        >>> _, report = blockdiag.compress(
        ...     model, blockdiag.BlockDiagonal(4, min_features=16), dry_run=True, progress=False
        ... )
        >>> report.total("cost_before").parameters, report.total("cost_after").parameters
        (4096, 1024)
        >>> report.skipped
        {'1': 'fewer than 16 features'}
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

    Leaves out parameters that are `counted` already, for another layer that shares them.
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
    if hasattr(layer, "block_size"):
        name += f"[{'x'.join(map(str, layer.block_size))} blocks, {100 * layer.density:.3g}%]"
    if hasattr(layer, "rank"):
        name += f"[rank {layer.rank}]"
    if hasattr(layer, "in_features"):
        return f"{name} {layer.in_features}→{layer.out_features}"
    groups = f", {layer.groups} groups" if layer.groups > 1 else ""
    kernel = "x".join(map(str, layer.weight.shape[2:]))
    return f"{name} {layer.in_channels}→{layer.out_channels}, {kernel}{groups}"


def measure_pair(before: nn.Module, after: nn.Module, shape: Sequence[int], rounds: int = 30) -> tuple[float, float]:
    """Median seconds of a forward pass of each on random input, without gradients, interleaved, after a warm-up."""
    parameter = next(before.parameters())
    generator = torch.Generator(parameter.device).manual_seed(0)  # not the user's
    input = torch.randn(shape, device=parameter.device, dtype=parameter.dtype, generator=generator)
    # Without hooks, which may be the user's and are not to see this.
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
