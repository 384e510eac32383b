"""The one verb: layers of a model become structured ones, along a config for each."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from blockdiag._surgery.duplicate import duplicate
from blockdiag._surgery.optimizers import Reordering, as_optimizers, held_by
from blockdiag._surgery.replacement import commit, unwrap
from blockdiag.compression.calibration import Calibration, collect
from blockdiag.compression.checks import attention_projections
from blockdiag.compression.config import Change, Config, Selected, as_number, as_whole
from blockdiag.compression.numerics.moments import Moments
from blockdiag.compression.progress import track
from blockdiag.compression.report import CompressionReport, LayerReport, cost, describe, measure_pair
from blockdiag.compression.select import LayerPattern, Layers, Rule, as_rules, select


class Compression(NamedTuple):
    """The model after :func:`blockdiag.compress`, and the report on it.

    Example::

        >>> import torch, blockdiag
        >>> dense = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> result = blockdiag.compress(dense, blockdiag.BlockDiagonal(num_blocks=4), progress=False)
        >>> result.report.total("cost_after").parameters
        1088
    """

    model: nn.Module
    report: CompressionReport


def compress(
    model: nn.Module,
    config: Config | Mapping[LayerPattern, Config | None],
    layers: Layers = "*",
    *,
    calibration: Calibration | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    inplace: bool = False,
    dry_run: bool = False,
    measure: int | None = None,
    progress: bool = True,
    budget: float | None = None,
) -> Compression:
    r"""Replaces dense layers of a model by structured ones with fewer parameters and operations, and reports on them.

    The config says which structure: :class:`~blockdiag.BlockDiagonal`, :class:`~blockdiag.BlockSparse`,
    :class:`~blockdiag.LowRank` or :class:`~blockdiag.Monarch`. The new layers are those of the structure that are
    closest to the dense ones: in their weights, or with ``calibration`` in their outputs on these inputs. Layers that
    are compressed already are compressed further: :class:`~blockdiag.LowRank` and :class:`~blockdiag.Monarch` lower the
    rank of what they made. Whether the model still works must be measured, and most models need training afterwards.

    Everything is built beside the model; it and its optimizers change at the end, all or nothing. The model's code runs
    on throwaway copies only. Module hooks, training mode, ``requires_grad``, attributes of parameters, dtype and device
    carry over; shared layers and shared weights stay shared.

    Args:
        model: any module, before, in or after training. A :class:`~torch.nn.parallel.DistributedDataParallel` is
            wrapped anew: use the model that is returned.
        config: what the chosen layers become. Or a mapping of patterns to configs, where the first pattern that matches
            a layer decides, and ``None`` leaves it alone; a pattern is a glob, a regular expression or a class. Layers
            that share a weight need equal configs.
        layers: which layers: a glob on names (``"encoder.*.linear1"``), a compiled regular expression that is searched
            for in names, a class of layers (``torch.nn.Conv2d``), a sequence of these, or a function of name and layer
            that returns whether to compress it. Default: all that the config takes. To be left out if ``config`` is a
            mapping.
        calibration: batches of the model's inputs, or a function that runs the model on some. A batch is a tensor, a
            tuple or list of positional arguments, or a mapping of keyword arguments. Several times as many rows as
            features are advisable. What runs, and what a function is given, is a copy of the model, in eval mode,
            without gradients and without the hooks that others registered (a warning says so if there are any). Takes
            memory for this copy, and for ``in_features ** 2`` double-precision numbers for each layer: compress a large
            model part by part.
        optimizers: optimizers of the model, rebound to the new parameters, with the state that maps to them: that of
            the kept entries of weights and biases, Adam's moments included. Needs ``inplace``.
        inplace: whether to change the model itself. Default: a copy.
        dry_run: whether to change nothing and only report.
        measure: rows of input to time each layer on before and after, or with ``calibration``, any number: the shape
            seen there is taken. Default: no timing.
        progress: whether to show progress bars (by tqdm, where installed).
        budget: fraction, up to 1, that may be kept: of the operations of all low-rank and Monarch layers together,
            shared out by rank to where they reduce the error most, and of the parameters of each block-diagonal and
            block-sparse layer.
            Not beside a config that fixes a size itself.

    Returns:
        ``(model, report)``, the latter a :class:`~blockdiag.compression.CompressionReport`.

    Raises:
        TypeError: ``model``, ``config``, ``layers``, ``calibration``, ``optimizers``, ``measure`` or ``budget`` are of
            another type.
        ValueError: nothing is chosen, or a pattern matches nothing; sizes are not divisible, or ``budget`` is missing,
            out of range, or contradicts a config; a layer is lazy, quantized, parametrized, on the meta device, not
            finite, has a forward of its own, shares parameters with layers that stay, or memory with other parameters;
            or calibration inputs do not fit.

    Example::

        >>> import torch, blockdiag
        >>> from blockdiag import BlockDiagonal, LowRank
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
        >>> config = {"0": BlockDiagonal(num_blocks=4), "*": LowRank(rank=0.25, min_features=0)}
        >>> model, report = blockdiag.compress(model, config, calibration=[torch.randn(500, 64)], progress=False)
        >>> [layer.after for layer in report.layers]
        ['BlockDiagLinear[4 blocks] 64→64', 'LowRankLinear[rank 8] 64→32']
    """
    rules = as_rules(config, layers)
    measure = None if measure is None else as_whole(None, "measure", measure, 0)
    if budget is not None and not 0 < (budget := as_number("budget", budget)) <= 1:
        raise ValueError(f"expected budget to be a fraction above 0, up to 1, but got {budget}")
    for rule in rules:
        if rule.config is not None:
            rule.config.check_budget(budget)
    wrapper, bare = model, unwrap(model)
    bound = as_optimizers(optimizers, bare, inplace=inplace or dry_run)
    chosen, skipped = _choose(bare, rules, budget)  # before any copy, which takes time: bad input is reported at once
    for selected in chosen:
        if "" in (name for names in selected.names for name in names):
            raise ValueError("the model is itself the layer to compress: put it into an nn.Sequential")

    moments_of: dict[str, Moments] = {}
    shapes_of: dict[str, tuple[int, ...]] = {}
    if calibration is not None:
        read = attention_projections(bare)
        moments_of, shapes_of = collect(bare, wrapper, _first_names(chosen), read, calibration, progress)
    if not (inplace or dry_run):
        bare = duplicate(bare)
        chosen, skipped = _choose(bare, rules, budget)
    moments = {layer: moments_of[name] for name, layer in _first_names(chosen).items() if name in moments_of}
    shapes = {layer: shapes_of[name] for name, layer in _first_names(chosen).items() if name in shapes_of}

    changes, left_alone = _build(chosen, moments, budget, progress)
    report = CompressionReport(skipped={**skipped, **left_alone})
    reorderings: list[Reordering] = []
    if not dry_run:
        for finish in dict.fromkeys(selected.config.finish for selected in chosen):
            reorderings += finish(bare, changes)
    counted: set[nn.Parameter] = set()
    read = attention_projections(bare)
    for change in track(changes, "measuring", progress and measure is not None):
        report.layers.append(_report_on(change, moments, shapes, measure, counted))
        if change.replacement.old in read:
            report.layers[-1].multiplied_out()
    if not changes:
        warnings.warn(f"nothing was compressed: {report.skipped}", stacklevel=2)

    if dry_run or (inplace and not changes):
        return Compression(model, report)
    if inplace:
        _warn_of_optimizers(reorderings, bound)
    return Compression(commit(wrapper, bare, [change.replacement for change in changes], reorderings, bound), report)


def _choose(model: nn.Module, rules: Sequence[Rule], budget: float | None) -> tuple[list[Selected], dict[str, str]]:
    """The layers to compress, and the reasons to leave others alone, by name."""
    kept = []
    chosen, skipped = select(model, rules)
    for selected in chosen:
        reason = selected.config.check(selected, budget)
        if reason is None:
            kept.append(selected)
        else:
            skipped.update({name: reason for names in selected.names for name in names})
    return kept, skipped


def _first_names(chosen: Sequence[Selected]) -> dict[str, nn.Module]:
    return {names[0]: layer for s in chosen for layer, names in zip(s.layers, s.names, strict=True)}


def _build(
    chosen: Sequence[Selected], moments: Mapping[nn.Module, Moments], budget: float | None, progress: bool
) -> tuple[list[Change], dict[str, str]]:
    """All changes, in the order of the layers, and the reasons to leave layers alone, by name."""
    planned: dict[Callable[..., Any], list[Selected]] = {}
    for selected in chosen:
        planned.setdefault(selected.config.plan, []).append(selected)
    build = {plan: plan(together, moments, budget) for plan, together in planned.items()}
    changes: list[Change] = []
    left_alone: dict[str, str] = {}
    for selected in track(chosen, "projecting", progress):
        built = build[selected.config.plan](selected)
        if isinstance(built, str):
            left_alone.update({name: built for names in selected.names for name in names})
        else:
            changes += built
    return changes, left_alone


def _warn_of_optimizers(reorderings: Sequence[Reordering], optimizers: Sequence[Optimizer]) -> None:
    """An optimizer that is not passed keeps the parameter, with moments in the old order."""
    held = held_by(optimizers)
    names = [r.name for r in reorderings if r.parameter.requires_grad and r.parameter not in held]
    if names:
        warnings.warn(
            f"{names} took over permutations of neighbors, so their values are in another order. The state of an "
            "optimizer that has them is not, unless it is given as optimizers=: make such a one anew",
            stacklevel=3,
        )


def _report_on(
    change: Change,
    moments: Mapping[nn.Module, Moments],
    shapes: Mapping[nn.Module, tuple[int, ...]],
    measure: int | None,
    counted: set[nn.Parameter],
) -> LayerReport:
    old: Any = change.replacement.old
    new = change.replacement.new
    before = after = None
    if measure is not None and (old in shapes or hasattr(old, "in_features")):
        shape = shapes.get(old) or (measure, old.in_features)
        before, after = measure_pair(old, new, shape)
    return LayerReport(
        name=change.replacement.names[0],
        before=describe(old),
        after=describe(new),
        cost_before=cost(old, before, counted),
        cost_after=cost(new, after, counted),
        steps=change.steps,
        calibrated=old in moments,
    )
