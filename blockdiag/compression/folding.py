"""Folds permutations of features between layers into each other, or into dense neighbors.

Which ones follows from the model's structure alone, never from values, so that models compressed alike are alike.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from blockdiag._surgery.elementwise import ELEMENTWISE_FUNCTIONS, is_elementwise
from blockdiag._surgery.optimizers import Reordering
from blockdiag._surgery.plain import has_hooks
from blockdiag._surgery.sharing import names_by_module
from blockdiag._surgery.trace import graphs
from blockdiag.compression.checks import can_be_reordered
from blockdiag.compression.config import Change
from blockdiag.nn.permuted_block_diag_linear import PermutedBlockDiagLinear


def _followed_by(model: nn.Module, graph: fx.Graph, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each layer the one that its output is the only input of, with at most elementwise functions in between."""
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr" and node.users}

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
    """Names of linear layers of which one's output is only the other's input, but for elementwise functions.

    By a trace of the model; of layers that have one name, and no hooks.
    """
    layers = {
        where[0]: module
        for module, where in names_by_module(model).items()
        if isinstance(module, nn.Linear) and len(where) == 1 and not has_hooks(module)
    }
    followers = [_followed_by(model, graph, layers) for graph in graphs(model)]
    alike = followers and all(other == followers[0] for other in followers)
    return list(followers[0].items()) if alike else []


def _reordered(name: str, linear: nn.Linear, order: Tensor, dim: int) -> list[Reordering]:
    """Puts output features (`dim` 0) or input features (`dim` 1) of a dense layer into this order."""
    return [
        Reordering(f"{name}.{key}", parameter, lambda tensor: tensor.index_select(dim, order))
        for key, parameter in linear.named_parameters()
        if dim < parameter.dim()
    ]


def fold_permutations(model: nn.Module, changes: Sequence[Change]) -> list[Reordering]:
    """Merges or removes permutations of the new layers; returns the reorderings of dense neighbors that take over."""
    new: dict[nn.Module, Any] = {change.replacement.old: change.replacement.new for change in changes}
    if not any(isinstance(layer, PermutedBlockDiagLinear) for layer in new.values()):
        return []
    reorderings = []
    for first_name, second_name in _pairs(model):
        first: Any = model.get_submodule(first_name)
        second: Any = model.get_submodule(second_name)
        producer: Any = new.get(first)
        consumer: Any = new.get(second)
        leaving = getattr(producer, "output_permutation", None)
        entering = getattr(consumer, "input_permutation", None)
        if leaving is not None and entering is not None:
            producer.output_permutation, consumer.input_permutation = None, leaving[entering]
        elif leaving is not None and consumer is None and can_be_reordered(model, second):
            reorderings += _reordered(second_name, second, leaving.argsort(), dim=1)
            producer.output_permutation = None
        elif entering is not None and producer is None and can_be_reordered(model, first):
            reorderings += _reordered(first_name, first, entering, dim=0)
            consumer.input_permutation = None
    for change in changes:
        layer = change.replacement.new
        if (
            isinstance(layer, PermutedBlockDiagLinear)
            and layer.input_permutation is None
            and layer.output_permutation is None
        ):
            change.replacement.new = layer.blocks
    return reorderings
