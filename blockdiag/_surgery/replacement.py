"""Replaces layers of a model, with their hooks, and their parameters in optimizers: all or nothing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockdiag._surgery.duplicate import HOOKS
from blockdiag._surgery.optimizers import Reordering, Successor, held_by, rebind, restored_on_failure
from blockdiag._surgery.plain import carry_attributes


@dataclass
class Replacement:
    """A layer that replaces another, under every name of the other in the model."""

    names: list[str]
    old: nn.Module
    new: nn.Module
    successors: dict[nn.Parameter, list[Successor]] = field(default_factory=dict)


def parent_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the named one, and the attribute's name."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


def fill(tensor: Tensor, values: Tensor) -> None:
    with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
        tensor.copy_(values)


def _reorder(reordering: Reordering, undo: list[Callable[[], None]]) -> None:
    """Reorders in place, so that optimizers and hooks keep the parameter."""
    parameter = reordering.parameter
    own = [value for value in vars(parameter).values() if isinstance(value, Tensor) and value.shape == parameter.shape]
    for tensor in (parameter, parameter.grad, *own):
        if tensor is not None:
            before = tensor.detach().clone()
            undo.append(partial(fill, tensor, before))
            fill(tensor, reordering.gather(before))


def _use_slow_path(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[nn.Module, str, Any]]:
    """Attributes that disable the fused kernel of torch's transformer layers, which supports dense weights only.

    In inference, :class:`torch.nn.TransformerEncoderLayer` passes the weights of its linear layers to that kernel, and
    :class:`torch.nn.TransformerEncoder` reads them.
    """
    parents = {parent_of(model, name)[0] for name in names}
    layers = {parent for parent in parents if isinstance(parent, nn.TransformerEncoderLayer)}
    for module in model.modules():
        if module in layers:
            yield module, "activation_relu_or_gelu", 0
        elif isinstance(module, nn.TransformerEncoder) and layers & set(module.layers):
            yield module, "use_nested_tensor", False


def commit(
    wrapper: nn.Module,
    model: nn.Module,
    replacements: Sequence[Replacement],
    reorderings: Sequence[Reordering],
    optimizers: Sequence[Optimizer],
) -> nn.Module:
    """Replaces the layers in the model and their parameters in the optimizers; on failure, changes nothing.

    Returns:
        The model, in a wrapper like the one given.
    """
    successors: dict[nn.Parameter, list[Successor]] = {}
    names: dict[nn.Parameter, str] = {}
    for replacement in replacements:
        for name, parameter in replacement.new.named_parameters():
            names.setdefault(parameter, f"{replacement.names[0]}.{name}")
        for parameter, replacing in replacement.successors.items():
            known = {successor.parameter for successor in successors.setdefault(parameter, [])}
            successors[parameter] += [successor for successor in replacing if successor.parameter not in known]
    for optimizer in optimizers:
        new = [s.parameter for parameter in held_by([optimizer]) for s in successors.get(parameter, [])]
        if type(optimizer).__name__ == "Muon" and any(parameter.dim() != 2 for parameter in new):
            raise ValueError("Muon takes matrices only, and the new layers have parameters of other dimensions")
    attributes = list(_use_slow_path(model, (name for r in replacements for name in r.names)))

    with restored_on_failure(optimizers) as undo:
        for optimizer in optimizers:
            rebind(optimizer, successors, names, reorderings)
        for reordering in reorderings:
            _reorder(reordering, undo)
        for parameter, replacing in successors.items():
            for successor in replacing:
                carry_attributes(parameter, successor.parameter, successor.gather)
                if parameter.grad is not None and successor.gather is not None:
                    gradient = successor.gather(parameter.grad)
                    # In the successor's memory format, not the old gradient's.
                    successor.parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
        for replacement in replacements:
            for hooks in HOOKS:  # the same dictionaries, so that handles still remove their hooks
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
        TypeError: it is not a module.
        ValueError: the wrapper has state that a new one could not take over.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {model!r}")
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return model
    for name in ("_comm_hooks", "mixed_precision"):
        if getattr(model, name, None):
            raise ValueError(f"DistributedDataParallel with {name.strip('_')} is to be made after the conversion")
    return model.module


def rewrap(wrapper: nn.Module, model: nn.Module) -> nn.Module:
    """The model in a new wrapper like the given one: DistributedDataParallel ignores parameters added later."""
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
