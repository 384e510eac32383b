"""Putting layers in the place of others: in the model, with their hooks, and in the optimizers. All or nothing."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# From a tensor of the old parameter's shape to the corresponding entries in the new parameter's shape.
Gather = Callable[[Tensor], Tensor]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass
class Heir:
    """A parameter that takes the place of another, and how the other's optimizer state maps to its own, if it does."""

    name: str
    parameter: nn.Parameter
    gather: Gather | None = None


@dataclass
class Replacement:
    """One layer for another, at every name that the other has in the model."""

    names: list[str]
    old: nn.Module
    new: nn.Module
    heirs: dict[nn.Parameter, list[Heir]] = field(default_factory=dict)


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
            elsewhere = name not in ("param_groups", "state") and isinstance(value, list | tuple)
            if elsewhere and any(isinstance(item, Tensor) for item in value):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps parameters in its {name} too, where they cannot be exchanged: "
                    "make a new one after the conversion"
                )
    return listed


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the one of this name, and its name there."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def _inherit_state(old: nn.Parameter, state: Mapping[str, Any], heir: Heir) -> dict[str, Any]:
    """The heir's optimizer state: tensors of the parameter's shape mapped, all else (step counts) copied.

    None where that says nothing of the heir: of factors, and if tensors have other shapes, as factored moments have.
    """
    if heir.gather is None:
        # SGD's fused kernel does not take some parameters with a buffer and some without.
        fresh = state.keys() == {"momentum_buffer"} and state["momentum_buffer"] is not None
        return {"momentum_buffer": torch.zeros_like(heir.parameter)} if fresh else {}
    if any(isinstance(value, Tensor) and value.dim() > 0 and value.shape != old.shape for value in state.values()):
        return {}
    inherited: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            value = heir.gather(value).contiguous() if value.shape == old.shape else value
            value = value.detach().clone()
        inherited[key] = value
    return inherited


def _rebind(
    optimizer: Optimizer, heirs: Mapping[nn.Parameter, list[Heir]], prefixes: Mapping[nn.Parameter, str]
) -> None:
    """Gives the heirs their elders' place in the parameter groups, and what state maps."""
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
    for parameter, successors in heirs.items():
        if parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            for heir in successors:
                inherited = _inherit_state(parameter, state, heir)
                if inherited:
                    optimizer.state[heir.parameter] = inherited


@contextmanager
def _restored_on_failure(optimizers: Sequence[Optimizer]) -> Iterator[list[Callable[[], None]]]:
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


def _use_slow_path(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Attributes that keep torch's fused transformer layers from reading the weights of layers that they hold.

    In inference :class:`torch.nn.TransformerEncoderLayer` hands the weights of its linear layers to a fused kernel, and
    :class:`torch.nn.TransformerEncoder` looks at them; both then work with dense weights only.
    """
    parents = {parent_of(model, name)[0] for name in names}
    layers = {parent for parent in parents if isinstance(parent, nn.TransformerEncoderLayer)}
    for module in model.modules():
        if module in layers:
            yield module, "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder) and layers & set(module.layers):
            yield module, "use_nested_tensor", False


def commit(
    wrapper: nn.Module, model: nn.Module, replacements: Sequence[Replacement], optimizers: Sequence[Optimizer]
) -> nn.Module:
    """Replaces the layers in the model and their parameters in the optimizers; if anything fails, nothing at all.

    Returns:
        The model, in a wrapper like the one given.
    """
    heirs: dict[nn.Parameter, list[Heir]] = {}
    prefixes: dict[nn.Parameter, str] = {}
    for replacement in replacements:
        for parameter, successors in replacement.heirs.items():
            prefixes.setdefault(parameter, f"{replacement.names[0]}.")
            known = {heir.parameter for heir in heirs.setdefault(parameter, [])}
            heirs[parameter] += [heir for heir in successors if heir.parameter not in known]
    for optimizer in optimizers:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        new = [heir.parameter for parameter in held for heir in heirs.get(parameter, [])]
        if type(optimizer).__name__ == "Muon" and any(parameter.dim() != 2 for parameter in new):
            raise ValueError("Muon takes matrices only, and the new layers have parameters of other dimensions")
    attributes = list(_use_slow_path(model, (name for r in replacements for name in r.names)))

    with _restored_on_failure(optimizers) as undo:
        for optimizer in optimizers:
            _rebind(optimizer, heirs, prefixes)
        for parameter, successors in heirs.items():
            for heir in successors:
                if parameter.grad is not None and heir.gather is not None:
                    heir.parameter.grad = heir.gather(parameter.grad).contiguous()
        for replacement in replacements:
            for hooks in _HOOKS:  # the same dictionaries: handles that remove hooks go on working
                replacement.new.__dict__[hooks] = replacement.old.__dict__[hooks]
            for name in replacement.names:
                parent, key = parent_of(model, name)
                undo.append(partial(parent.add_module, key, replacement.old))
                parent.add_module(key, replacement.new)
        for module, attribute, value in attributes:
            undo.append(partial(setattr, module, attribute, getattr(module, attribute)))
            setattr(module, attribute, value)
        return rewrap(wrapper, model)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside :class:`torch.nn.parallel.DistributedDataParallel`.

    Raises:
        ValueError: the wrapper has what another could not take over.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    for name in ("_comm_hooks", "mixed_precision"):
        if getattr(model, name, None):
            raise ValueError(f"DistributedDataParallel with {name.strip('_')} is to be made after the conversion")
    return model.module


def rewrap(wrapper: nn.Module, model: nn.Module) -> nn.Module:
    """The model in a wrapper like the one given. DistributedDataParallel knows the parameters of its start only."""
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return model
    rewrapped = nn.parallel.DistributedDataParallel(
        model,
        device_ids=wrapper.device_ids,
        output_device=wrapper.output_device,
        dim=wrapper.dim,
        broadcast_buffers=wrapper.broadcast_buffers,
        process_group=wrapper.process_group,
        bucket_cap_mb=wrapper.bucket_bytes_cap / 2**20,
        find_unused_parameters=wrapper.find_unused_parameters,
        gradient_as_bucket_view=wrapper.gradient_as_bucket_view,
        static_graph=wrapper.static_graph,
    )
    rewrapped.training = wrapper.training
    return rewrapped
