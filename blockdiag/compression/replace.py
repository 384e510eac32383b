"""Dense linear layers become block-diagonal ones."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockdiag._surgery.optimizers import Heir
from blockdiag._surgery.replacement import Replacement, fill
from blockdiag.compression import projection
from blockdiag.compression.convert import Build, Change, Conversion, convert, merged
from blockdiag.compression.folding import fold_permutations
from blockdiag.compression.moments import Calibration, Moments, exact
from blockdiag.compression.report import Step
from blockdiag.compression.select import IN_ATTENTION, LINEARS, Policy, Selected, attention_projections, select
from blockdiag.nn.block_diag_linear import BlockDiagLinear
from blockdiag.nn.permuted_block_diag_linear import PermutedBlockDiagLinear


def replace_linear(
    model: nn.Module,
    policy: Policy = "*",
    *,
    num_blocks: int | None = None,
    parameter_budget: float | None = None,
    min_features: int = 0,
    permute: bool = False,
    calibration: Calibration | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    inplace: bool = False,
    dry_run: bool = False,
    measure: int | None = None,
    progress: bool = True,
) -> Conversion:
    r"""Replaces :class:`torch.nn.Linear` layers of a model by block-diagonal ones, and reports what that costs.

    A dense weight seldom is block diagonal as it stands, so the replacement is brought closer to it in up to three
    steps, each reported with its error: the diagonal blocks are kept; with ``permute``, inputs and outputs are first
    assigned to blocks such that most of the weight's energy, or with ``calibration`` of its products with the inputs'
    variances, falls on the blocks; with ``calibration``, blocks and bias are refitted to the dense layer's outputs by
    least squares. A step that does not help is not taken. Whether the model still works must be measured, and most need
    training afterwards.

    Permutations are merged, or folded into neighbors, where that changes nothing: between linear layers that only
    elementwise functions lie between, in a model whose forward :mod:`torch.fx` can record, whatever its values and
    mode. Features between such layers come in another order. A neighbor keeps its parameters, with their values in
    another order; so has an optimizer's state if it is among ``optimizers``, and a warning names it if it is not. Which
    permutations stay follows from the model's structure and these arguments alone, so that checkpoints of models
    converted alike fit. A dry run folds nothing, and reports layers with all of their permutations.

    Everything is built beside the model; it and its optimizers change at the end, all or nothing. The model's code runs
    on throwaway copies only. Module hooks, training mode, ``requires_grad``, attributes of parameters, dtype and device
    carry over, shared layers and shared weights stay shared.

    Args:
        model: any module. A :class:`~torch.nn.parallel.DistributedDataParallel` is wrapped anew: use what is returned.
        policy: which layers: a glob on names (``"encoder.*.linear1"``), a compiled regular expression, a list of these,
            a mapping of these to numbers of blocks, or a function of name and layer that returns whether to replace it,
            or its number of blocks.
        num_blocks: number of blocks where the policy gives none.
        parameter_budget: instead of ``num_blocks``, the fraction of each dense weight's parameters that may be kept;
            the smallest number of blocks within it that divides the layer's sizes is taken.
        min_features: leaves layers with fewer input or output features alone.
        permute: whether to look for permutations. Needs scipy and scikit-learn.
        calibration: batches of the model's inputs, or a function that runs the model on some. A batch is a tensor, a
            tuple or list of positional arguments, or a mapping of keyword arguments. Several times as many rows as
            features are advisable. What runs, and what a function is given, is a copy of the model, in eval mode,
            without gradients and without the hooks that others registered (a warning says so if there are any). Takes
            memory for this copy, and for ``in_features ** 2`` double-precision numbers for each layer: convert a large
            model part by part.
        optimizers: optimizers of the model, rebound to the new parameters, with what state maps to them: that of the
            kept entries of weight and bias, Adam's moments included. Needs ``inplace``.
        inplace: whether to change the model itself. Default: a copy.
        dry_run: whether to change nothing and only report.
        measure: rows of input to time each layer on before and after, or with ``calibration``, anything: the shape seen
            there is taken. Default: no timing.
        progress: whether to show progress bars (by tqdm, where installed).

    Returns:
        ``(model, report)``.

    Raises:
        ValueError: the policy matches nothing, sizes are not divisible, a layer is lazy, quantized, parametrized, on
            the meta device, not finite, has a forward of its own, shares parameters with what stays or memory with
            other parameters, or calibration inputs do not fit.
    """
    if num_blocks is not None and parameter_budget is not None:
        raise ValueError("expected either num_blocks or parameter_budget, but got both")
    if parameter_budget is not None and not 0 < parameter_budget <= 1:
        raise ValueError(f"expected parameter_budget to be a fraction of 0 to 1, but got {parameter_budget}")

    def choose(model: nn.Module) -> tuple[list[Selected], dict[str, str]]:
        chosen, skipped = select(model, policy, LINEARS)
        read = attention_projections(model)
        kept = []
        for selected in chosen:
            reason = None
            if read & set(selected.layers):
                reason = IN_ATTENTION
            elif min(selected.layer.in_features, selected.layer.out_features) < min_features:
                reason = f"fewer than {min_features} features"
            if reason:
                skipped.update({name: reason for names in selected.names for name in names})
                continue
            selected.setting = _blocks_of(selected, num_blocks, parameter_budget)
            kept.append(selected)
        return kept, skipped

    def prepare(chosen: list[Selected], moments: Mapping[nn.Module, Moments]) -> Build:
        return lambda selected: _replace(selected, moments, permute)

    return convert(
        model,
        choose,
        prepare,
        finish=fold_permutations,
        calibration=calibration,
        optimizers=optimizers,
        inplace=inplace,
        dry_run=dry_run,
        measure=measure,
        progress=progress,
    )


def _blocks_of(selected: Selected, num_blocks: int | None, parameter_budget: float | None) -> int:
    layer, name = selected.layer, selected.name
    sizes = f"in_features={layer.in_features}, out_features={layer.out_features}"
    blocks = selected.setting if selected.setting is not None else num_blocks
    if blocks is not None:
        if blocks < 1 or layer.in_features % blocks or layer.out_features % blocks:
            raise ValueError(f"'{name}' ({sizes}) cannot be split into {blocks} equal blocks")
        return blocks
    if parameter_budget is None:
        raise ValueError(f"neither num_blocks nor parameter_budget nor the policy says how to split '{name}'")
    smallest = min(layer.in_features, layer.out_features)
    for blocks in range(1, smallest + 1):
        if layer.in_features % blocks == 0 and layer.out_features % blocks == 0 and 1 / blocks <= parameter_budget:
            return blocks
    raise ValueError(f"'{name}' ({sizes}): no number of equal blocks keeps it within a budget of {parameter_budget}")


def _replace(selected: Selected, moments: Mapping[nn.Module, Moments], permute: bool) -> list[Change]:
    linear, num_blocks = selected.layer, selected.setting
    assert num_blocks is not None
    weight = exact(linear.weight)
    centered = all(layer.bias is not None for layer in selected.layers)  # type: ignore[union-attr]
    known = merged(selected, moments)
    plain = known.second(centered=False)[0] if known else None
    second = known.second(centered)[0] if known else None

    def error(difference: Tensor, second: Tensor | None) -> float:
        return projection.relative_error(weight, difference, second, plain)

    def differs(blocks: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return weight - projection.scatter_blocks(blocks, rows, columns)

    def fitted(rows: Tensor, columns: Tensor) -> Tensor:
        """The best blocks there, as the layer will store them."""
        if second is None:
            blocks = projection.diagonal_blocks(weight, rows, columns, num_blocks)
        else:
            blocks = projection.refit_blocks(weight, rows, columns, num_blocks, second)
        return exact(blocks.to(linear.weight.dtype))

    rows, columns = (torch.arange(size, device=weight.device) for size in weight.shape)
    diagonal = projection.diagonal_blocks(weight, rows, columns, num_blocks)
    steps = [Step("diagonal blocks", error(differs(diagonal, rows, columns), plain))]
    blocks = fitted(rows, columns)
    permuted = permute and num_blocks > 1  # then there are permutations, of whatever values: checkpoints fit
    if permuted:
        energies = weight.abs().square() * (1 if plain is None else plain.diagonal().real)
        new_rows, new_columns = (o.to(weight.device) for o in projection.find_permutations(energies, num_blocks))
        new_blocks = fitted(new_rows, new_columns)
        if error(differs(new_blocks, new_rows, new_columns), second) < error(differs(blocks, rows, columns), second):
            rows, columns, blocks = new_rows, new_columns, new_blocks
            diagonal = projection.diagonal_blocks(weight, rows, columns, num_blocks)
            steps.append(Step("permuted", error(differs(diagonal, rows, columns), plain)))
    shifts: dict[nn.Module, Tensor] = {}
    if second is not None:
        difference = differs(blocks, rows, columns)
        steps.append(Step("refitted", error(difference, second)))
        if centered:
            shared = len({layer.bias for layer in selected.layers}) < len(selected.layers)  # type: ignore[arg-type]
            for layer in selected.layers:
                mean = (known if shared and known else moments[layer]).mean[0]
                shifts[layer] = difference @ mean
    return _make_layers(selected, permuted, blocks, rows, columns, steps, shifts)


def _make_layers(
    selected: Selected,
    permuted: bool,
    blocks: Tensor,
    rows: Tensor,
    columns: Tensor,
    steps: list[Step],
    shifts: Mapping[nn.Module, Tensor],
) -> list[Change]:
    """The layers with these blocks, one weight for all of them."""
    num_blocks = len(blocks)
    first: Any = None
    prefix = "blocks." if permuted else ""
    biases: dict[nn.Parameter, nn.Parameter] = {}
    changes = []
    for layer, names in zip(selected.layers, selected.names, strict=True):
        old: Any = layer
        new: Any = BlockDiagLinear._empty_like(old, old.in_features, old.out_features, num_blocks)
        if first is None:
            first = new
            fill(new.weight, blocks)
        else:
            new.weight = first.weight
        heir = Heir(f"{prefix}weight", new.weight, lambda t: projection.diagonal_blocks(t, rows, columns, num_blocks))
        heirs = {old.weight: [heir]}
        if old.bias is not None:
            if old.bias in biases:
                new.bias = biases[old.bias]
            else:
                fill(new.bias, (exact(old.bias) + shifts.get(layer, 0))[rows])
                biases[old.bias] = new.bias
            heirs[old.bias] = [Heir(f"{prefix}bias", new.bias, lambda t: t[rows])]
        if permuted:
            new = PermutedBlockDiagLinear.from_blocks(new, columns, rows.argsort())
        changes.append(Change(Replacement(names, old, new, heirs), steps))
    return changes
