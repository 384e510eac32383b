"""Permutations between layers that a neighbour can take over, or that cancel out."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from blockdiag.conversion.convert import Change
from blockdiag.conversion.elementwise import ELEMENTWISE_FUNCTIONS, has_hooks, is_elementwise
from blockdiag.conversion.select import has_parameters_to_itself
from blockdiag.conversion.surgery import Gather, Heir, Replacement
from blockdiag.factors import PermutedBlockDiagLinear


def _trace(model: nn.Module) -> list[fx.Graph]:
    """What the model's forward does, in training and in eval mode; nothing if that depends on its input.

    Of the whole model: a part that could be traced by itself may be used by others in another way.
    """
    graphs = []
    modes = [(module, module.training) for module in model.modules()]
    try:
        for mode in (True, False):
            model.train(mode)
            graphs.append(fx.Tracer().trace(model))
    except Exception:  # tracing runs the user's code, on what is no tensor: anything may come of it
        return []
    finally:
        for module, training in modes:
            module.training = training
    return graphs


def _followed_by(model: nn.Module, graph: fx.Graph, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The layer whose only input each layer's output is, if it is, through elementwise functions at most."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def is_layer(node: fx.Node) -> bool:
        return node.target in layers and calls.count(node.target) == 1 and node.target not in read

    def elementwise(node: fx.Node) -> bool:
        if len(node.all_input_nodes) != 1:
            return False
        if node.op == "call_module":
            return is_elementwise(model.get_submodule(str(node.target)))
        return node.op in ("call_function", "call_method") and node.target in ELEMENTWISE_FUNCTIONS

    followers = {}
    for start in graph.nodes:
        if start.op != "call_module" or not is_layer(start):
            continue
        node = start
        while len(node.users) == 1:
            (node,) = node.users
            if node.op == "call_module" and is_layer(node):
                followers[str(start.target)] = str(node.target)
                break
            if not elementwise(node):
                break
    return followers


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of linear layers of which one's output is nothing but the other's input, but for elementwise functions.

    By a trace of the model; of layers that have one name, with nobody looking on by hooks.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = {
        where[0]: module
        for module, where in names.items()
        if isinstance(module, nn.Linear) and len(where) == 1 and not has_hooks(module)
    }
    followers = [_followed_by(model, graph, layers) for graph in _trace(model)]
    return list(followers[0].items()) if followers and followers[0] == followers[-1] else []


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
    for first_name, second_name in _pairs(model):
        first, second = model.get_submodule(first_name), model.get_submodule(second_name)
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
