"""What all conversions share: select, calibrate, build everything beside the model, measure, and only then replace."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from blockdiag._surgery.duplicate import duplicate
from blockdiag._surgery.optimizers import Reordering, as_optimizers, held_by
from blockdiag._surgery.replacement import Replacement, commit, unwrap
from blockdiag._surgery.sharing import check_sharing
from blockdiag.compression.moments import (
    Calibration,
    Moments,
    add_moments,
    all_or_none,
    collect_moments,
    no_moments,
    sum_over_processes,
)
from blockdiag.compression.progress import track
from blockdiag.compression.report import ConversionReport, LayerReport, Step, cost, describe, measure_pair
from blockdiag.compression.select import Selected, attention_projections, check_parameters, check_parts


class Conversion(NamedTuple):
    """The model after a conversion, and the report on it."""

    model: nn.Module
    report: ConversionReport


class Change(NamedTuple):
    """What is to become of one layer; the steps of its projection with their errors."""

    replacement: Replacement
    steps: list[Step]


# From layers that share a weight to their changes; or why there is none.
Build = Callable[[Selected], list[Change] | str]
# From the selected layers, and the moments of each where known, to the function that builds one after the other.
Prepare = Callable[[list[Selected], Mapping[nn.Module, Moments]], Build]


def merged(selected: Selected, moments: Mapping[nn.Module, Moments]) -> Moments | None:
    """The moments of all layers that share a weight, together; None if one of them is not known."""
    known = [moments[layer] for layer in selected.layers if layer in moments]
    if len(known) < len(selected.layers):
        return None
    return add_moments(known)


def _collect(
    model: nn.Module, wrapper: nn.Module, chosen: list[Selected], calibration: Calibration | None, progress: bool
) -> tuple[dict[str, Moments], dict[str, tuple[int, ...]]]:
    """Moments and shapes of inputs by the first name of each layer, as a copy of the model sees them."""
    if calibration is None:
        return {}, {}
    layers = {names[0]: layer for s in chosen for layer, names in zip(s.layers, s.names, strict=True)}
    group = wrapper.process_group if isinstance(wrapper, nn.parallel.DistributedDataParallel) else None
    with all_or_none(group, next(model.parameters()).device):
        moments, shapes = collect_moments(model, list(layers), calibration, progress)
    if group is not None:  # each process saw inputs of its own, or none
        for name, layer in layers.items():
            moments[name] = sum_over_processes(moments.get(name, no_moments(layer)), group)
        moments = {name: m for name, m in moments.items() if m.num_rows > 0}
    read = attention_projections(model)  # never called
    for name, layer in layers.items():
        if name not in moments and layer not in read:
            raise ValueError(f"the calibration inputs never reached '{name}': leave it out, or give inputs that do")
        if name in moments and moments[name].num_rows < moments[name].total.shape[-1]:
            warnings.warn(
                f"'{name}' has {moments[name].total.shape[-1]} inputs, but was calibrated on only "
                f"{moments[name].num_rows} rows: it will fit these better than others",
                stacklevel=4,
            )
    return moments, {name: tuple(shape) for name, shape in shapes.items()}


def _check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer], inplace: bool) -> None:
    """Raises if the optimizers are not those of the model that is converted.

    Raises:
        ValueError: there are optimizers of a copy, or of another model.
    """
    if optimizers and not inplace:
        raise ValueError("optimizers hold the parameters of the model itself, not of a copy: pass inplace=True")
    if optimizers and not held_by(optimizers) & set(model.parameters()):
        raise ValueError("the optimizers hold no parameter of the model")


def convert(
    model: nn.Module,
    select: Callable[[nn.Module], tuple[list[Selected], dict[str, str]]],
    prepare: Prepare,
    *,
    finish: Callable[[nn.Module, list[Change]], list[Reordering]] | None = None,
    calibration: Calibration | None,
    optimizers: Optimizer | Iterable[Optimizer],
    inplace: bool,
    dry_run: bool,
    measure: int | None,
    progress: bool,
) -> Conversion:
    """Converts a model: nothing in it or its optimizers changes before everything else is done.

    ``finish`` sees all changes before they are made, in no dry run, and returns what parameters of others do then.
    """
    bound = as_optimizers(optimizers)
    wrapper, bare = model, unwrap(model)
    chosen, skipped = select(bare)  # before any copy, which takes time: bad input is reported at once
    _check_optimizers(bare, bound, inplace or dry_run)
    for selected in chosen:
        if "" in (name for names in selected.names for name in names):
            raise ValueError("the model is itself the layer to convert: put it into an nn.Sequential")

    moments_of, shapes_of = _collect(bare, wrapper, chosen, calibration, progress)
    if not (inplace or dry_run):
        bare = duplicate(bare)
        chosen, skipped = select(bare)
    named = [(names[0], layer) for s in chosen for layer, names in zip(s.layers, s.names, strict=True)]
    moments = {layer: moments_of[name] for name, layer in named if name in moments_of}
    shapes = {layer: shapes_of[name] for name, layer in named if name in shapes_of}
    report = ConversionReport(skipped=skipped)
    changes: list[Change] = []
    build = prepare(chosen, moments)
    for selected in track(chosen, "projecting", progress):
        built = build(selected)
        if isinstance(built, str):
            report.skipped.update({name: built for names in selected.names for name in names})
        else:
            changes += built
    beside = finish(bare, changes) if finish is not None and not dry_run else []
    counted: set[nn.Parameter] = set()
    read = attention_projections(bare)
    for change in track(changes, "measuring", progress and measure is not None):
        report.layers.append(_report_on(change, moments, shapes, measure, counted))
        if change.replacement.old in read:
            report.layers[-1].multiplied_out()
    if not changes:
        warnings.warn(f"nothing was converted: {report.skipped}", stacklevel=3)

    if dry_run or (inplace and not changes):
        return Conversion(model, report)
    if inplace:
        _warn_of_optimizers(beside, bound)
    return Conversion(commit(wrapper, bare, [change.replacement for change in changes], beside, bound), report)


def _warn_of_optimizers(reorderings: Sequence[Reordering], optimizers: Sequence[Optimizer]) -> None:
    """An optimizer that nobody handed over goes on with the parameter, but its moments are in the old order."""
    held = held_by(optimizers)
    names = [r.name for r in reorderings if r.parameter.requires_grad and r.parameter not in held]
    if names:
        warnings.warn(
            f"{names} took over permutations of neighbors, so their values are in another order. The state of an "
            "optimizer that has them is not, unless it is given as optimizers=: make such a one anew",
            stacklevel=4,
        )


def exchange(
    model: nn.Module,
    matches: Callable[[nn.Module], bool],
    build: Callable[[list[str], nn.Module], Replacement],
    *,
    missing: str,
    optimizers: Optimizer | Iterable[Optimizer],
    inplace: bool,
) -> nn.Module:
    """Replaces modules by others that compute the same, made from their names and themselves.

    Raises:
        ValueError: there are none, or it is the model itself, which `missing` says; or one has parameters that are not
            plain, or shared with others.
    """
    bound = as_optimizers(optimizers)
    _check_optimizers(unwrap(model), bound, inplace)
    bare = unwrap(model) if inplace else duplicate(unwrap(model))
    names: dict[nn.Module, list[str]] = {}
    for name, module in bare.named_modules(remove_duplicate=False):
        if matches(module):
            names.setdefault(module, []).append(name)
    if not names or bare in names:
        raise ValueError(missing)
    for module, where in names.items():
        check_parts(where[0], module)
        check_parameters(where[0], module)
    check_sharing(bare, {module: where[0] for module, where in names.items()})
    replacements = [build(where, module) for module, where in names.items()]
    for replacement in replacements:
        lost = [key for key, p in replacement.old.named_parameters() if p not in replacement.heirs]
        if lost:
            raise ValueError(
                f"'{replacement.names[0]}' has parameters {lost} of pruning or the like: remove that first"
            )
    return commit(model, bare, replacements, [], bound)


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
