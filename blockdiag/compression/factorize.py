"""Dense linear layers and convolutions become products of smaller ones: low rank, or Monarch."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockdiag._surgery.duplicate import duplicate, random_state_kept
from blockdiag._surgery.optimizers import Heir
from blockdiag._surgery.replacement import Replacement, fill
from blockdiag.compression import projection
from blockdiag.compression.convert import Build, Change, Conversion, convert, merged
from blockdiag.compression.moments import Calibration, Moments, exact
from blockdiag.compression.ranks import Candidate, Target, choose_ranks
from blockdiag.compression.report import Step
from blockdiag.compression.select import (
    CONVOLUTIONS,
    FACTORS,
    IN_ATTENTION,
    LINEARS,
    Policy,
    Selected,
    attention_projections,
    select,
)
from blockdiag.nn import LowRankConv, LowRankLinear, MonarchLinear


class _Matrices(NamedTuple):
    """A layer as the matrices that it multiplies rows of inputs with, one for each group."""

    weight: Tensor  # (groups, N, K), in double
    second: Tensor | None  # (groups, K, K)
    uncentered: Tensor | None  # the same where second is a covariance
    mean: Tensor | None  # (groups, K)
    num_blocks: tuple[int, int]  # of its factors


def factorize(
    model: nn.Module,
    policy: Policy = "*",
    *,
    method: Literal["low_rank", "monarch"] = "low_rank",
    latent_features: float | None = None,
    latent_channels: float | None = None,
    num_blocks: int | tuple[int, int] | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    operation_budget: float | None = None,
    min_features: int = 256,
    min_channels: int = 256,
    calibration: Calibration | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    inplace: bool = False,
    dry_run: bool = False,
    measure: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Replaces linear layers and convolutions of a model by products of smaller ones, where that saves operations.

    ``method="low_rank"`` gives :class:`~blockdiag.LowRankLinear` and, for convolutions, grouped ones too,
    :class:`~blockdiag.LowRankConv`; ``method="monarch"`` gives :class:`~blockdiag.MonarchLinear` for linear layers. The
    factors are the best approximation of the weight (truncated singular value decompositions); with ``calibration`` of
    the layer's outputs on these inputs, with the bias adjusted: in closed form for low rank, for Monarch by descent
    from there over its submatrices.

    The number of features in between, the rank, is given or found: ``latent_features``, ``latent_channels`` or ``rank``
    fix it, ``max_error`` takes the smallest rank within that error for each layer, and ``operation_budget`` shares out
    operations among all selected layers, each next rank to where it takes away the most error for its operations.

    :class:`torch.nn.MultiheadAttention` reads its output projection's weight instead of calling the layer: factorised,
    it saves parameters there, but no operations, as the report says; with ``operation_budget`` it is left alone. Apply
    :func:`~blockdiag.split_attention` first to have four projections that are called.

    Everything is built beside the model; it and its optimizers change at the end, all or nothing. See
    :func:`~blockdiag.replace_linear` for what carries over, and for the arguments not described here.

    Args:
        model: any module, before, in or after training.
        policy: which layers; numbers that it gives are ranks.
        method: the structure.
        latent_features: rank of linear layers; below 1 the fraction of the smaller of ``in_features`` and
            ``out_features``. Default: 0.25.
        latent_channels: the same for convolutions; of grouped ones the rank of each group. Default: 0.25.
        num_blocks: of Monarch: blocks of the first factor and of the second, or one number for both. Default: for each
            the largest divisor of the features up to their square root.
        rank: of Monarch: rank of the submatrices. Default: 1.
        max_error: largest relative error of each layer; see :class:`~blockdiag.compression.LayerReport`.
        operation_budget: fraction of the selected layers' operations that may be kept.
        min_features: leaves linear layers with fewer input or output features alone.
        min_channels: leaves convolutions with fewer input or output channels alone.

    Returns:
        ``(model, report)``.

    Raises:
        ValueError: as :func:`~blockdiag.replace_linear`, or contradicting or impossible settings.
    """
    if method not in ("low_rank", "monarch"):
        raise ValueError(f"expected method to be 'low_rank' or 'monarch', but got {method!r}")
    monarch = method == "monarch"
    if monarch and (latent_features is not None or latent_channels is not None):
        raise ValueError("latent_features and latent_channels are of method='low_rank': of Monarch give rank")
    if not monarch and (num_blocks is not None or rank is not None):
        raise ValueError("num_blocks and rank are of method='monarch': of low rank give latent_features")

    if monarch and rank is None and max_error is None and operation_budget is None:
        rank = 1
    target = Target.of(latent_features, latent_channels, rank, max_error, operation_budget)

    def choose(model: nn.Module) -> tuple[list[Selected], dict[str, str]]:
        chosen, skipped = select(model, policy, LINEARS if monarch else (*LINEARS, *CONVOLUTIONS))
        read = attention_projections(model)
        kept = []
        for selected in chosen:
            layer = selected.layer
            if isinstance(layer, nn.Linear):
                sizes, minimum, what = (layer.in_features, layer.out_features), min_features, "features"
            else:
                sizes, minimum, what = (layer.in_channels, layer.out_channels), min_channels, "channels"
            reason = None
            if read & set(selected.layers) and operation_budget is not None:
                reason = IN_ATTENTION
            elif min(sizes) < minimum:
                reason = f"fewer than {minimum} {what}"
            if reason:
                skipped.update({name: reason for names in selected.names for name in names})
                continue
            if monarch:
                _monarch_blocks(selected, num_blocks)  # raises if they do not divide its sizes
            kept.append(selected)
        return kept, skipped

    def structure(selected: Selected) -> tuple[int, int]:
        return _monarch_blocks(selected, num_blocks) if monarch else (1, 1)

    return convert(
        model,
        choose,
        _preparer(structure, target),
        calibration=calibration,
        optimizers=optimizers,
        inplace=inplace,
        dry_run=dry_run,
        measure=measure,
        progress=progress,
    )


def lower_rank(
    model: nn.Module,
    policy: Policy = "*",
    *,
    latent_features: float | None = None,
    latent_channels: float | None = None,
    rank: int | None = None,
    max_error: float | None = None,
    operation_budget: float | None = None,
    calibration: Calibration | None = None,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    inplace: bool = False,
    dry_run: bool = False,
    measure: int | None = None,
    progress: bool = True,
) -> Conversion:
    """Lowers the rank of layers that :func:`factorize` made, as training goes on; of these, those the policy names.

    The products are projected anew; layers whose rank would not fall are left alone. ``operation_budget`` is a fraction
    of the operations of the factorised layers. All arguments are those of :func:`factorize`.
    """
    target = Target.of(latent_features, latent_channels, rank, max_error, operation_budget)
    return convert(
        model,
        lambda model: select(model, policy, FACTORS),
        _preparer(lambda selected: getattr(selected.layer, "num_blocks", (1, 1)), target),
        calibration=calibration,
        optimizers=optimizers,
        inplace=inplace,
        dry_run=dry_run,
        measure=measure,
        progress=progress,
    )


def near_square_blocks(features: int) -> int:
    """The largest divisor of `features` up to its square root: as many blocks as Monarch's, or fewer."""
    return max(d for d in range(1, math.isqrt(features) + 1) if features % d == 0)


def _monarch_blocks(selected: Selected, num_blocks: int | tuple[int, int] | None) -> tuple[int, int]:
    layer = selected.layer
    if num_blocks is None:
        return near_square_blocks(layer.in_features), near_square_blocks(layer.out_features)
    blocks = (num_blocks, num_blocks) if isinstance(num_blocks, int) else num_blocks
    if min(blocks) < 1 or layer.in_features % blocks[0] or layer.out_features % blocks[1]:
        raise ValueError(
            f"'{selected.name}' (in_features={layer.in_features}, out_features={layer.out_features}) cannot be split "
            f"into {blocks} equal blocks"
        )
    return blocks


def _matrices(selected: Selected, moments: Mapping[nn.Module, Moments], num_blocks: tuple[int, int]) -> _Matrices:
    layer = selected.layer
    groups = getattr(layer, "groups", 1)
    known = merged(selected, moments)
    centered = all(layer.bias is not None for layer in selected.layers)  # type: ignore[union-attr]
    return _Matrices(
        _weight(layer).unflatten(0, (groups, -1)),
        known.second(centered) if known else None,
        known.second(centered=False) if known else None,
        known.mean if known else None,
        num_blocks,
    )


def _preparer(
    structure: Callable[[Selected], tuple[int, int]], target: Target
) -> Callable[[list[Selected], Mapping[nn.Module, Moments]], Build]:
    """Chooses the ranks of all layers at once, then makes the function that builds each."""

    def prepare(chosen: list[Selected], moments: Mapping[nn.Module, Moments]) -> Build:
        needs_spectra = target.max_error is not None or target.operation_budget is not None
        candidates = {}
        for selected in chosen:
            matrices = _matrices(selected, moments, structure(selected))
            groups, rows, columns = matrices.weight.shape
            in_blocks, out_blocks = matrices.num_blocks
            candidates[id(selected)] = Candidate(
                selected,
                is_conv=hasattr(selected.layer, "in_channels"),
                smaller=min(getattr(selected.layer, "in_channels", columns) // groups, rows),
                largest=min(rows // out_blocks, columns // in_blocks),
                before=sum(part.weight.numel() for part in _parts(selected.layer)),
                each=groups * (out_blocks * columns + in_blocks * rows),
                spectrum=_spectrum(matrices) if needs_spectra else torch.empty(0),
            )
        ranks = choose_ranks(list(candidates.values()), target)

        def build(selected: Selected) -> list[Change] | str:
            rank, limit = ranks[id(selected)], candidates[id(selected)].limit
            matrices = _matrices(selected, moments, structure(selected))
            found = None
            if target.max_error is not None and selected.setting is None:
                found = _smallest_rank(selected.layer, matrices, target.max_error, rank, limit)
                if found is None:
                    return f"no rank that saves operations (up to {limit}) has an error of at most {target.max_error}"
            elif rank <= limit:
                found = rank, *_project(selected.layer, matrices, rank)
            if found is None:
                return f"rank {rank} would not save operations (up to {limit} would)"
            rank, layer, error = found
            return _changes(selected, layer, matrices, moments, Step(f"rank {rank}", error))

        return build

    return prepare


def _smallest_rank(
    layer: Any, matrices: _Matrices, max_error: float, likely: int, limit: int
) -> tuple[int, Any, float] | None:
    """The smallest rank up to the limit whose error, as measured on the layer, is within the bound, and its layer.

    What the spectrum tells is exact but for rounding, and the likely rank is the answer, or next to it. Of several
    submatrices whose inputs are known it is an estimate, and the rank is found by bisection.
    """

    def within(error: float) -> bool:
        return error <= max_error * (1 + 1e-6)

    if matrices.second is None or matrices.num_blocks[0] == 1:
        for rank in range(likely, limit + 1):
            new, error = _project(layer, matrices, rank)
            if within(error):
                return rank, new, error
        return None
    best, low, high = None, 1, limit
    while low <= high:
        rank = (low + high) // 2
        new, error = _project(layer, matrices, rank)
        if within(error):
            best, high = (rank, new, error), rank - 1
        else:
            low = rank + 1
    return best


def _spectrum(matrices: _Matrices) -> Tensor:
    """Energy that each next rank takes away from the error, relative to that of the outputs, all groups together."""
    seconds = [None] * len(matrices.weight) if matrices.second is None else list(matrices.second)
    energies = sum(
        projection.spectrum(weight, matrices.num_blocks, second)
        for weight, second in zip(matrices.weight, seconds, strict=True)
    )
    assert isinstance(energies, Tensor)
    return energies / projection.energy(matrices.weight, matrices.uncentered).clamp(
        min=torch.finfo(energies.dtype).tiny
    )


def _project(layer: Any, matrices: _Matrices, rank: int) -> tuple[Any, float]:
    """A layer like the given one, but for the bias, with the closest factors of this rank, and its error."""
    seconds = [None] * len(matrices.weight) if matrices.second is None else list(matrices.second)
    factors = [
        projection.monarch(weight, matrices.num_blocks, rank, second)
        for weight, second in zip(matrices.weight, seconds, strict=True)
    ]
    new = _empty_layer(layer, matrices.num_blocks, rank)
    for part, values in zip(_parts(new), zip(*factors, strict=True), strict=True):
        fill(part.weight, torch.stack(values).reshape(part.weight.shape))
    difference = matrices.weight - _weight(new).view_as(matrices.weight)
    return new, projection.relative_error(matrices.weight, difference, matrices.second, matrices.uncentered)


def _empty_layer(old: Any, num_blocks: tuple[int, int], rank: int) -> Any:
    """Of the old layer's sizes, device and dtype; with a bias if it has one. Draws no random numbers."""
    device = _first_parameter(old).device
    if hasattr(old, "in_channels"):
        with random_state_kept():  # on the meta device, and then emptied, it would lose its memory format
            return LowRankConv.from_conv(old, rank)
    arguments = (rank, old.bias is not None, "meta", _first_parameter(old).dtype)
    if isinstance(old, MonarchLinear) or num_blocks != (1, 1):
        return MonarchLinear(old.in_features, old.out_features, num_blocks, *arguments).to_empty(device=device)
    return LowRankLinear(old.in_features, old.out_features, *arguments).to_empty(device=device)


def _first_parameter(layer: nn.Module) -> nn.Parameter:
    return next(layer.parameters())


def _parts(layer: Any) -> tuple[Any, ...]:
    """The layers that have the weights: the two factors, or a dense layer itself."""
    if isinstance(layer, MonarchLinear):
        return layer.first, layer.second
    return (layer.down, layer.up) if isinstance(layer, FACTORS) else (layer,)


def _weight(layer: Any) -> Tensor:
    """The layer's weight, of factors multiplied out in double, flattened to a matrix."""
    dtype = torch.promote_types(_first_parameter(layer).dtype, torch.float64)
    precise = duplicate(layer, hooks=False).to(dtype) if isinstance(layer, FACTORS) else layer
    return exact(precise.weight).flatten(1)


def _changes(
    selected: Selected, new: Any, matrices: _Matrices, moments: Mapping[nn.Module, Moments], step: Step
) -> list[Change]:
    """The new layer for each of those that share a weight, and the biases that make up for the mean of the error."""
    difference = matrices.weight - _weight(new).view_as(matrices.weight)
    biases: dict[nn.Parameter, nn.Parameter] = {}
    shared_bias = len({layer.bias for layer in selected.layers}) < len(selected.layers)  # type: ignore[arg-type]
    changes: list[Change] = []
    for layer, names in zip(selected.layers, selected.names, strict=True):
        old: Any = layer
        replacing = new if not changes else _empty_layer(old, matrices.num_blocks, new.rank)
        olds = _parts(old)
        for part, original, before in zip(_parts(replacing), _parts(new), olds * (3 - len(olds)), strict=True):
            part.weight = original.weight.requires_grad_(before.weight.requires_grad)
        names_of = {parameter: name for name, parameter in replacing.named_parameters()}
        fresh = [Heir(names_of[part.weight], part.weight) for part in _parts(replacing)]
        # A dense weight has both factors for heirs; of old factors each has its own.
        heirs = {olds[0].weight: fresh} if len(olds) == 1 else {o.weight: [h] for o, h in zip(olds, fresh, strict=True)}
        if old.bias is not None:
            last = _parts(replacing)[-1]
            if old.bias in biases:
                last.bias = biases[old.bias]
            else:
                mean = None
                if matrices.mean is not None:
                    mean = matrices.mean if shared_bias else moments[layer].mean
                shift = 0 if mean is None else (difference @ mean.unsqueeze(-1)).flatten()
                fill(last.bias, exact(old.bias) + shift)
                last.bias.requires_grad_(old.bias.requires_grad)
                biases[old.bias] = last.bias
            heirs[old.bias] = [Heir(f"{names_of[last.weight].removesuffix('weight')}bias", last.bias, lambda t: t)]
        changes.append(Change(Replacement(names, old, replacing.train(old.training), heirs), [step]))
    return changes
