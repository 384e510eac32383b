"""Replaces parameters, or reorders them in place, in the optimizers that hold them."""

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
class Successor:
    """A parameter that replaces another. Without `gather`, gradient and optimizer state do not map to it."""

    parameter: nn.Parameter
    gather: Gather | None = None


@dataclass
class Reordering:
    """A parameter that stays, with its values reordered."""

    name: str
    parameter: nn.Parameter
    gather: Gather


def as_optimizers(
    optimizers: Optimizer | Iterable[Optimizer], model: nn.Module, *, inplace: bool
) -> Sequence[Optimizer]:
    """One or several optimizers of the model as a list.

    Raises:
        TypeError: one is not an optimizer, or they are not iterable.
        ValueError: one keeps parameters outside of its groups (LBFGS, ZeroRedundancyOptimizer); none holds a parameter
            of the model; or the conversion copies the model, and with it the parameters.
    """
    if not isinstance(optimizers, Optimizer | Iterable):
        raise TypeError(f"expected optimizers to be torch.optim.Optimizer, but got {type(optimizers).__name__}")
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
    if listed and not inplace:
        raise ValueError("optimizers hold the parameters of the model itself, not of a copy: pass inplace=True")
    if listed and not held_by(listed) & set(model.parameters()):
        raise ValueError("the optimizers hold no parameter of the model")
    return listed


def held_by(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    return {parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}


def _holds_parameters(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(item, Tensor) or _holds_parameters(item) for item in value)
    if isinstance(value, Mapping):
        return any(isinstance(key, nn.Parameter) for key in value) or _holds_parameters(list(value.values()))
    return False


def _is_scalar(value: Any) -> bool:
    """Whether optimizer state is a number, such as a step count, or a container of numbers."""
    if isinstance(value, list | tuple | dict):
        return all(map(_is_scalar, value.values() if isinstance(value, dict) else value))
    if isinstance(value, Tensor):
        return value.dim() == 0
    return value is None or isinstance(value, bool | int | float | complex | str)


def _is_elementwise(value: Any, parameter: Tensor, trusted: bool) -> bool:
    """Whether optimizer state is a number, or has a value for each entry of the parameter.

    The preconditioner of a square matrix has the matrix's shape, but is symmetric, which moments are not. torch's own
    optimizers, which are `trusted`, have none.
    """
    if not isinstance(value, Tensor) or value.dim() == 0:
        return _is_scalar(value)
    may_be_preconditioner = value.dim() == 2 and value.shape[0] == value.shape[1] and value.numel() > 1
    if trusted or not may_be_preconditioner:
        return value.shape == parameter.shape
    return value.shape == parameter.shape and (not value.any() or not torch.allclose(value, value.mT))


def _not_elementwise(optimizer: Optimizer) -> set[str]:
    """The keys of the optimizer's state that are not elementwise for some parameter: preconditioners, factors."""
    trusted = type(optimizer).__module__.startswith("torch.optim.")
    return {
        key
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if not _is_elementwise(value, parameter, trusted)
    }


def _mapped_state(state: Mapping[str, Any], successor: Successor, not_elementwise: set[str]) -> dict[str, Any]:
    """The successor's optimizer state: tensors of the parameter's shape mapped, numbers copied.

    Empty, so that the optimizer starts from scratch, if nothing maps (factors of a weight), or if some of it is not
    elementwise (preconditioners, factored moments).
    """
    if successor.gather is None:
        # SGD's fused kernel requires a buffer for all parameters or for none.
        fresh = state.keys() == {"momentum_buffer"} and state["momentum_buffer"] is not None
        return {"momentum_buffer": torch.zeros_like(successor.parameter)} if fresh else {}
    if any(key in not_elementwise and not _is_scalar(value) for key, value in state.items()):
        return {}
    mapped: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            value = successor.gather(value).contiguous() if value.dim() > 0 else value
            mapped[key] = value.detach().clone()
        else:
            mapped[key] = copy.deepcopy(value)
    return mapped


def rebind(
    optimizer: Optimizer,
    successors: Mapping[nn.Parameter, list[Successor]],
    names: Mapping[nn.Parameter, str],
    reorderings: Sequence[Reordering],
) -> None:
    """Replaces old parameters by their successors in the groups, under the given names, and maps the state."""
    not_elementwise = _not_elementwise(optimizer)
    placed: set[nn.Parameter] = set()
    for group in optimizer.param_groups:
        old_names = group.get("param_names") or [""] * len(group["params"])
        new: list[tuple[nn.Parameter, str]] = []
        for parameter, name in zip(group["params"], old_names, strict=True):
            if parameter not in successors:
                new.append((parameter, name))
                continue
            # Tied parameters share one successor, which is placed once.
            fresh = [s.parameter for s in successors[parameter] if s.parameter not in placed]
            placed.update(fresh)
            new += [(parameter, names[parameter]) for parameter in fresh]
        group["params"] = [parameter for parameter, _ in new]
        if group.get("param_names") is not None:
            group["param_names"] = [name for _, name in new]
    reordered = [(r.parameter, [Successor(r.parameter, r.gather)]) for r in reorderings]
    for parameter, replacing in [*successors.items(), *reordered]:
        if parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            for successor in replacing:
                mapped = _mapped_state(state, successor, not_elementwise)
                if mapped:
                    optimizer.state[successor.parameter] = mapped


@contextmanager
def restored_on_failure(optimizers: Sequence[Optimizer]) -> Iterator[list[Callable[[], None]]]:
    """On an exception, runs the steps added to the list, last first, and restores the optimizers."""
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
