"""What all conversions share: select, calibrate, build everything beside the model, measure, and only then replace."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockdiag.conversion.moments import (
    Calibration,
    Moments,
    add_moments,
    all_or_none,
    collect_moments,
    no_moments,
    sum_over_processes,
)
from blockdiag.conversion.progress import track
from blockdiag.conversion.report import ConversionReport, LayerReport, Step, cost, describe, measure_pair
from blockdiag.conversion.select import Selected, attention_projections, check_parameters, check_sharing
from blockdiag.conversion.surgery import Replacement, as_optimizers, commit, unwrap


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


def fill(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def merged(selected: Selected, moments: Mapping[nn.Module, Moments]) -> Moments | None:
    """The moments of all layers that share a weight, together; None if one of them is not known."""
    known = [moments[layer] for layer in selected.layers if layer in moments]
    if len(known) < len(selected.layers):
        return None
    return add_moments(known)


def _collect(
    model: nn.Module, wrapper: nn.Module, chosen: list[Selected], calibration: Calibration | None, progress: bool
) -> tuple[Mapping[nn.Module, Moments], Mapping[nn.Module, tuple[int, ...]]]:
    if calibration is None:
        return {}, {}
    layers = {names[0]: layer for s in chosen for layer, names in zip(s.layers, s.names, strict=True)}
    group = wrapper.process_group if isinstance(wrapper, nn.parallel.DistributedDataParallel) else None
    with all_or_none(group, next(model.parameters()).device):
        moments, shapes = collect_moments(model, layers, calibration, progress)
    if group is not None:  # each process saw inputs of its own, or none
        for layer in layers.values():
            moments[layer] = sum_over_processes(moments.get(layer, no_moments(layer)), group)
        moments = {layer: m for layer, m in moments.items() if m.num_rows > 0}
    read = attention_projections(model)  # never called
    for name, layer in layers.items():
        if layer not in moments and layer not in read:
            raise ValueError(f"the calibration inputs never reached '{name}': leave it out, or give inputs that do")
        if layer in moments and moments[layer].num_rows < moments[layer].total.shape[-1]:
            warnings.warn(
                f"'{name}' has {moments[layer].total.shape[-1]} inputs, but was calibrated on only "
                f"{moments[layer].num_rows} rows: it will fit these better than others",
                stacklevel=4,
            )
    return moments, {layer: tuple(shape) for layer, shape in shapes.items()}


def working_copy(model: nn.Module, optimizers: Sequence[Optimizer], inplace: bool) -> nn.Module:
    """The model to work on: itself, or a copy.

    Raises:
        ValueError: there are optimizers of a copy, or of another model.
    """
    if optimizers and not inplace:
        raise ValueError("optimizers hold the parameters of the model itself, not of a copy: pass inplace=True")
    held = {parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    if optimizers and not held & set(model.parameters()):
        raise ValueError("the optimizers hold no parameter of the model")
    return model if inplace else copy.deepcopy(model)


def convert(
    model: nn.Module,
    select: Callable[[nn.Module], tuple[list[Selected], dict[str, str]]],
    prepare: Prepare,
    *,
    finish: Callable[[nn.Module, list[Change]], list[Replacement]] | None = None,
    calibration: Calibration | None,
    optimizers: Optimizer | Iterable[Optimizer],
    inplace: bool,
    dry_run: bool,
    measure: int | None,
    progress: bool,
) -> Conversion:
    """Converts a model: nothing in it or its optimizers changes before everything else is done.

    ``finish`` sees all changes before they are made, and returns more replacements, of layers beside them.
    """
    bound = as_optimizers(optimizers)
    wrapper, bare = model, unwrap(model)
    chosen, skipped = select(bare)  # before the copy, which takes time: bad input is reported at once
    bare = working_copy(bare, bound, inplace or dry_run)
    if bare is not unwrap(model):
        chosen, skipped = select(bare)
    for selected in chosen:
        if "" in (name for names in selected.names for name in names):
            raise ValueError("the model is itself the layer to convert: put it into an nn.Sequential")

    moments, shapes = _collect(bare, wrapper, chosen, calibration, progress)
    report = ConversionReport(skipped=skipped)
    changes: list[Change] = []
    build = prepare(chosen, moments)
    for selected in track(chosen, "projecting", progress):
        built = build(selected)
        if isinstance(built, str):
            report.skipped.update({name: built for names in selected.names for name in names})
        else:
            changes += built
    beside = finish(bare, changes) if finish is not None else []
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
    return Conversion(commit(wrapper, bare, [change.replacement for change in changes] + beside, bound), report)


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
    bare = working_copy(unwrap(model), bound, inplace)
    names: dict[nn.Module, list[str]] = {}
    for name, module in bare.named_modules(remove_duplicate=False):
        if matches(module):
            names.setdefault(module, []).append(name)
    if not names or bare in names:
        raise ValueError(missing)
    for module, where in names.items():
        check_parameters(where[0], module)
    check_sharing(bare, {module: where[0] for module, where in names.items()})
    return commit(model, bare, [build(where, module) for module, where in names.items()], bound)


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
