"""Parameters in the place of others, or in another order, in the optimizers that hold them."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# From a tensor of the old parameter's shape to the corresponding entries in the new parameter's shape.
Gather = Callable[[Tensor], Tensor]


@dataclass
class Heir:
    """A parameter that takes the place of another, and how the other's optimizer state maps to its own, if it does."""

    name: str
    parameter: nn.Parameter
    gather: Gather | None = None


@dataclass
class Reordering:
    """A parameter that keeps its place and its shape, with its values in another order."""

    name: str
    parameter: nn.Parameter
    gather: Gather


def as_optimizers(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """One optimizer or several as a list.

    Raises:
        TypeError: something is no optimizer.
        ValueError: one keeps parameters beside its groups: LBFGS, and ZeroRedundancyOptimizer.
    """
    listed = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)
    for optimizer in listed:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected optimizers to be torch.optim.Optimizer, but got {type(optimizer).__name__}")
        for name, value in vars(optimizer).items():
            if name not in ("param_groups", "state", "defaults") and _holds_parameters(value):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps parameters in its {name} too, where they cannot be exchanged: "
                    "make a new one after the conversion"
                )
    return listed


def held_by(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    return {parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}


def _holds_parameters(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(item, Tensor) or _holds_parameters(item) for item in value)
    if isinstance(value, Mapping):
        return any(isinstance(key, nn.Parameter) for key in value) or _holds_parameters(list(value.values()))
    return False


def _is_elementwise(value: Any, parameter: Tensor, trusted: bool) -> bool:
    """Whether optimizer state is a number, or has a value for each entry of the parameter.

    A preconditioner of a square matrix has its shape too. Unlike moments it is symmetric.
    """
    if isinstance(value, list | tuple | dict):
        value = list(value.values()) if isinstance(value, dict) else value
        return all(_is_elementwise(item, torch.empty(()), trusted) for item in value)
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | complex | str)
    if value.dim() == 0:
        return True
    if trusted or value.dim() != 2 or value.shape[0] != value.shape[1] or value.numel() == 1:
        return value.shape == parameter.shape
    return value.shape == parameter.shape and (not value.any() or not torch.allclose(value, value.mT))


def _odd_keys(optimizer: Optimizer) -> set[str]:
    """Of the optimizer's state, what is not elementwise for some parameter: preconditioners, factored moments."""
    trusted = type(optimizer).__module__.startswith("torch.optim.")
    return {
        key
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if not _is_elementwise(value, parameter, trusted)
    }


def _inherit_state(old: nn.Parameter, state: Mapping[str, Any], heir: Heir, odd: set[str]) -> dict[str, Any]:
    """The heir's optimizer state: tensors of the parameter's shape mapped, numbers (step counts) copied.

    Empty, so that the optimizer starts anew, where the old one says nothing of the heir: of factors, and if any of it
    is not elementwise, as preconditioners and factored moments are not.
    """
    if heir.gather is None:
        # SGD's fused kernel does not take some parameters with a buffer and some without.
        fresh = state.keys() == {"momentum_buffer"} and state["momentum_buffer"] is not None
        return {"momentum_buffer": torch.zeros_like(heir.parameter)} if fresh else {}
    if any(key in odd and not _is_elementwise(value, torch.empty(()), True) for key, value in state.items()):
        return {}
    inherited: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            value = heir.gather(value).contiguous() if value.dim() > 0 else value
            inherited[key] = value.detach().clone()
        else:
            inherited[key] = copy.deepcopy(value)
    return inherited


def rebind(
    optimizer: Optimizer,
    heirs: Mapping[nn.Parameter, list[Heir]],
    prefixes: Mapping[nn.Parameter, str],
    reorderings: Sequence[Reordering],
) -> None:
    """Gives the heirs their elders' place in the parameter groups, and what state maps."""
    odd = _odd_keys(optimizer)
    placed: set[nn.Parameter] = set()
    for group in optimizer.param_groups:
        names = group.get("param_names")
        parameters, new_names = [], []
        for index, parameter in enumerate(group["params"]):
            successors = heirs.get(parameter)
            if successors is None:
                parameters.append(parameter)
                new_names.append(names[index] if names else "")
                continue
            # Of two elders with one heir, tied parameters, the first gives it its place.
            fresh = [heir for heir in successors if heir.parameter not in placed]
            placed.update(heir.parameter for heir in fresh)
            parameters += [heir.parameter for heir in fresh]
            new_names += [f"{prefixes[parameter]}{heir.name}" for heir in fresh]
        group["params"] = parameters
        if names is not None:
            group["param_names"] = new_names
    reordered = [(r.parameter, [Heir(r.name, r.parameter, r.gather)]) for r in reorderings]
    for parameter, successors in [*heirs.items(), *reordered]:
        if parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            for heir in successors:
                inherited = _inherit_state(parameter, state, heir, odd)
                if inherited:
                    optimizer.state[heir.parameter] = inherited


@contextmanager
def restored_on_failure(optimizers: Sequence[Optimizer]) -> Iterator[list[Callable[[], None]]]:
    """Undoes, latest first, what the list is told about, and brings the optimizers back, if anything is raised."""
    groups = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
    states = [dict(optimizer.state) for optimizer in optimizers]
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        for step in reversed(undo):
            step()
        for optimizer, old_groups, state in zip(optimizers, groups, states, strict=True):
            for group, old in zip(optimizer.param_groups, old_groups, strict=True):
                group.clear()
                group.update(old)
            optimizer.state.clear()
            optimizer.state.update(state)
        raise
