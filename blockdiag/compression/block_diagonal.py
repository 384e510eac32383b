"""Linear layers become block-diagonal ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockdiag._surgery.duplicate import random_state_kept
from blockdiag._surgery.optimizers import Reordering, Successor
from blockdiag._surgery.replacement import Replacement, fill
from blockdiag.compression.checks import IN_ATTENTION, LINEARS
from blockdiag.compression.config import Build, Change, Config, Selected, as_whole, set_field, too_small
from blockdiag.compression.folding import fold_permutations
from blockdiag.compression.numerics import projection
from blockdiag.compression.numerics.moments import Moments, exact
from blockdiag.compression.report import Step
from blockdiag.nn import BlockDiagLinear, PermutedBlockDiagLinear


@dataclass(frozen=True)
class BlockDiagonal(Config):
    """Linear layers become :class:`~blockdiag.BlockDiagLinear`, or :class:`~blockdiag.PermutedBlockDiagLinear`.

    A dense weight is seldom block diagonal, so the new layer is fitted to it in up to three steps, each reported with
    its error: the diagonal blocks are kept; with ``permute``, inputs and outputs are first assigned to blocks such that
    most of the weight's energy, or with ``calibration`` of its products with the inputs' variances, falls on the
    blocks; with ``calibration``, blocks and bias are fitted to the dense layer's outputs by least squares. A step that
    does not help is not taken.

    Permutations are merged, or folded into neighbors, where that changes nothing: between linear layers with only
    elementwise functions between them, in a model whose forward can be traced, whatever its values and mode. Features
    between such layers then come in another order. A neighbor keeps its parameters, with their values in another order,
    and so does the state of an optimizer if it is among ``optimizers``; a warning names the neighbor if it is not.
    Which permutations are left follows from the model's structure and the arguments alone, so that checkpoints of
    models compressed alike fit. A dry run folds nothing, and reports layers with all of their permutations.

    :class:`torch.nn.MultiheadAttention` reads the weight of its output projection instead of calling the layer, which
    is left alone: apply :func:`~blockdiag.split_attention` first.

    Args:
        num_blocks: number of blocks, a divisor of the layer's features. Default: the smallest one within ``budget``, a
            fraction of each weight's parameters.
        permute: whether to look for permutations. Needs scipy and scikit-learn.
        min_features: leaves layers with fewer input or output features alone.

    Raises:
        TypeError: ``num_blocks`` or ``min_features`` is not an int, or ``permute`` not a bool.
        ValueError: ``num_blocks`` is not positive, or ``min_features`` negative.

    Example::

        >>> import torch, blockdiag
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 48))
        >>> config = blockdiag.BlockDiagonal(num_blocks=4, min_features=16)
        >>> model, report = blockdiag.compress(model, config, progress=False)
        >>> model[0]
        BlockDiagLinear(in_features=64, out_features=32, num_blocks=4, bias=True)
        >>> model, report = blockdiag.compress(torch.nn.Sequential(torch.nn.Linear(24, 36)),
        ...                                    blockdiag.BlockDiagonal(), budget=0.3, progress=False)
        >>> model[0].num_blocks
        4
    """

    num_blocks: int | None = None
    permute: bool = False
    min_features: int = 0

    takes = LINEARS
    makes = (BlockDiagLinear, PermutedBlockDiagLinear)

    def __post_init__(self) -> None:
        if self.num_blocks is not None:
            set_field(self, "num_blocks", as_whole(self, "num_blocks", self.num_blocks, 1))
        if not isinstance(self.permute, bool):
            raise TypeError(f"BlockDiagonal: expected permute to be a bool, but got {self.permute!r}")
        set_field(self, "min_features", as_whole(self, "min_features", self.min_features, 0))

    def check_budget(self, budget: float | None) -> None:
        if (self.num_blocks is None) == (budget is None):
            got = "neither" if budget is None else "both"
            raise ValueError(f"BlockDiagonal: expected either num_blocks or budget, but got {got}")

    def check(self, selected: Selected, budget: float | None) -> str | None:
        reason = IN_ATTENTION if selected.in_attention else too_small(selected.layer, self.min_features)
        if reason is None:
            self._blocks_of(selected, budget)
        return reason

    @staticmethod
    def plan(chosen: Sequence[Selected], moments: Mapping[nn.Module, Moments], budget: float | None) -> Build:
        return lambda selected: selected.config._build(selected, moments, budget)

    @staticmethod
    def finish(model: nn.Module, changes: Sequence[Change]) -> list[Reordering]:
        return fold_permutations(model, changes)

    def _blocks_of(self, selected: Selected, budget: float | None) -> int:
        layer, name = selected.layer, selected.name
        sizes = f"in_features={layer.in_features}, out_features={layer.out_features}"

        def divides(blocks: int) -> bool:
            return layer.in_features % blocks == 0 and layer.out_features % blocks == 0

        if self.num_blocks is not None:
            if not divides(self.num_blocks):
                raise ValueError(f"'{name}' ({sizes}) cannot be split into {self.num_blocks} equal blocks")
            return self.num_blocks
        assert budget is not None  # by check_budget
        for blocks in range(1, min(layer.in_features, layer.out_features) + 1):
            if divides(blocks) and 1 / blocks <= budget:
                return blocks
        raise ValueError(f"'{name}' ({sizes}): no number of equal blocks keeps it within a budget of {budget}")

    def _build(self, selected: Selected, moments: Mapping[nn.Module, Moments], budget: float | None) -> list[Change]:
        layer, num_blocks = selected.layer, self._blocks_of(selected, budget)
        weight = exact(layer.weight)
        known = selected.merged(moments)
        plain = known.second(centered=False)[0] if known else None
        second = known.second(selected.all_have_bias)[0] if known else None

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
            return exact(blocks.to(layer.weight.dtype))

        rows, columns = (torch.arange(size, device=weight.device) for size in weight.shape)
        diagonal = projection.diagonal_blocks(weight, rows, columns, num_blocks)
        steps = [Step("diagonal blocks", error(differs(diagonal, rows, columns), plain))]
        blocks = fitted(rows, columns)
        # By the config alone, and not by values, so that checkpoints of models compressed alike fit.
        permuted = self.permute and num_blocks > 1
        if permuted:
            energies = weight.abs().square() * (1 if plain is None else plain.diagonal().real)
            with random_state_kept():  # the first import of scikit-learn draws from Python's
                orders = projection.find_permutations(energies, num_blocks)
            new_rows, new_columns = (order.to(weight.device) for order in orders)
            new_blocks = fitted(new_rows, new_columns)
            new_error = error(differs(new_blocks, new_rows, new_columns), second)
            if new_error < error(differs(blocks, rows, columns), second):
                rows, columns, blocks = new_rows, new_columns, new_blocks
                diagonal = projection.diagonal_blocks(weight, rows, columns, num_blocks)
                steps.append(Step("permuted", error(differs(diagonal, rows, columns), plain)))
        shifts: dict[nn.Module, Tensor] = {}
        if second is not None:
            difference = differs(blocks, rows, columns)
            steps.append(Step("refitted", error(difference, second)))
            if selected.all_have_bias:
                for each in selected.layers:
                    mean = (known if selected.share_bias and known else moments[each]).mean[0]
                    shifts[each] = difference @ mean
        return _changes(selected, blocks, rows, columns, permuted, shifts, steps)


def _changes(
    selected: Selected,
    blocks: Tensor,
    rows: Tensor,
    columns: Tensor,
    permuted: bool,
    shifts: Mapping[nn.Module, Tensor],
    steps: list[Step],
) -> list[Change]:
    """A layer with these blocks for each of the selected ones, with one weight for all of them."""
    num_blocks = len(blocks)
    weight: nn.Parameter | None = None
    biases: dict[nn.Parameter, nn.Parameter] = {}
    changes = []
    for layer, names in zip(selected.layers, selected.names, strict=True):
        old: Any = layer
        new: Any = BlockDiagLinear._empty_like(old, old.in_features, old.out_features, num_blocks)
        if weight is None:
            weight = new.weight
            fill(new.weight, blocks)
        else:
            new.weight = weight
        gather_blocks = Successor(new.weight, lambda t: projection.diagonal_blocks(t, rows, columns, num_blocks))
        successors = {old.weight: [gather_blocks]}
        if old.bias is not None:
            if old.bias in biases:
                new.bias = biases[old.bias]
            else:
                fill(new.bias, (exact(old.bias) + shifts.get(layer, 0))[rows])
                biases[old.bias] = new.bias
            successors[old.bias] = [Successor(new.bias, lambda t: t[rows])]
        if permuted:
            new = PermutedBlockDiagLinear.from_blocks(new, columns, rows.argsort())
        changes.append(Change(Replacement(names, old, new, successors), steps))
    return changes
