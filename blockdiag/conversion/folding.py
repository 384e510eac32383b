"""Permutations between layers that a neighbour can take over, or that cancel out."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from blockdiag.conversion.convert import Change
from blockdiag.conversion.elementwise import is_elementwise
from blockdiag.conversion.select import has_parameters_to_itself
from blockdiag.conversion.surgery import Gather, Heir, Replacement
from blockdiag.factors import PermutedBlockDiagLinear


def _pairs(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """Linear layers of which one's output is nothing but the other's input, through elementwise functions at most.

    That is known in an nn.Sequential only, of modules that are used nowhere else, with nobody looking on by hooks.
    """
    uses: dict[nn.Module, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        uses[module] = uses.get(module, 0) + 1
    pairs: list[tuple[str, nn.Module, str, nn.Module]] = []
    for path, sequence in model.named_modules():
        if type(sequence) is not nn.Sequential:
            continue
        last: tuple[str, nn.Module] | None = None
        for key, module in sequence.named_children():
            hooks = (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._backward_hooks,
                module._backward_pre_hooks,
            )
            private = uses[module] == 1 and not any(hooks)
            if private and isinstance(module, nn.Linear):
                name = f"{path}.{key}" if path else key
                if last is not None:
                    pairs.append((*last, name, module))
                last = (name, module)
            elif not (private and is_elementwise(module)):
                last = None
    return pairs


class _Neighbours:
    """Dense layers that take over a permutation: replaced by themselves with rows or columns in another order."""

    def __init__(self) -> None:
        self.replacements: dict[nn.Module, Replacement] = {}

    def reorder(self, name: str, linear: nn.Linear, order: Tensor, dim: int) -> None:
        """Output features (`dim` 0) or input features (`dim` 1) in this order."""
        if linear not in self.replacements:
            reordered = copy.copy(linear)
            reordered._parameters = dict(linear._parameters)
            self.replacements[linear] = Replacement([name], linear, reordered)
        replacement = self.replacements[linear]
        for key, old in linear._parameters.items():
            if old is None or dim >= old.dim():
                continue
            current = replacement.new._parameters[key]
            assert current is not None
            reordered_parameter = nn.Parameter(current.detach().index_select(dim, order), current.requires_grad)
            replacement.new._parameters[key] = reordered_parameter
            earlier = replacement.heirs.get(old)
            before: Gather | None = earlier[0].gather if earlier else None

            def gather(tensor: Tensor, before: Gather | None = before) -> Tensor:
                return (tensor if before is None else before(tensor)).index_select(dim, order)

            replacement.heirs[old] = [Heir(key, reordered_parameter, gather)]


def fold_permutations(model: nn.Module, changes: list[Change]) -> list[Replacement]:
    """Merges or removes permutations of the new layers; returns the dense neighbours that take some over."""
    new: dict[nn.Module, Any] = {change.replacement.old: change.replacement.new for change in changes}
    neighbours = _Neighbours()
    for first_name, first, second_name, second in _pairs(model):
        producer: Any = new.get(first)
        consumer: Any = new.get(second)
        leaving = None if producer is None else producer.output_permutation
        entering = None if consumer is None else consumer.input_permutation
        if leaving is not None and entering is not None:
            producer.output_permutation, consumer.input_permutation = None, unless_identity(leaving[entering])
        elif leaving is not None and consumer is None and has_parameters_to_itself(model, second):
            neighbours.reorder(second_name, second, leaving.argsort(), dim=1)  # type: ignore[arg-type]
            producer.output_permutation = None
        elif entering is not None and producer is None and has_parameters_to_itself(model, first):
            neighbours.reorder(first_name, first, entering, dim=0)  # type: ignore[arg-type]
            consumer.input_permutation = None
    return list(neighbours.replacements.values())


def unless_identity(permutation: Tensor) -> Tensor | None:
    identity = torch.arange(len(permutation), device=permutation.device)
    return None if torch.equal(permutation, identity) else permutation


def without_permutations(changes: list[Change]) -> None:
    """Plain block-diagonal layers for those that permute nothing."""
    for change in changes:
        layer = change.replacement.new
        if (
            isinstance(layer, PermutedBlockDiagLinear)
            and layer.input_permutation is None
            and layer.output_permutation is None
        ):
            change.replacement.new = layer.unpermuted()
