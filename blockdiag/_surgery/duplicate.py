"""Copies of models: to convert, or to run user code on without side effects on the original.

Calibration runs a full copy, at the cost of the parameters' memory: a forward, or `eval`, may write to parameters, as
layers that merge adapters do. Writes to ``.data`` do not increment the version, so they can neither be detected nor
undone without a copy. The moments of square layers take more memory than that.
"""

import copy
import random
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blockdiag._surgery.plain import is_compiled
from blockdiag._surgery.sharing import storage_key, tensors_of, ties

HOOKS = (
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


def duplicate(model: nn.Module, *, hooks: bool = True) -> Any:
    """A deep copy that, unlike Python's, preserves aliasing of tensors and attributes of parameters.

    Args:
        model: any module.
        hooks: whether to copy hooks. Those by which torch.nn.utils computes weights are always copied.

    Raises:
        ValueError: a module's forward was replaced by one that refers to the model's own modules.
    """
    named = list(tensors_of(model))
    storages = {storage_key(t): t.untyped_storage().clone() for (_, t), _ in ties(named)}
    copies: dict[int, Tensor] = {}
    for _, tensor in named:
        if not is_lazy(tensor) and storage_key(tensor) in storages:
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            place = (tensor.storage_offset(), tensor.shape, tensor.stride())
            view.set_(storages[storage_key(tensor)], *place)  # type: ignore[call-overload]
            copies[id(tensor)] = _as_parameter(view, tensor)
    return _deep_copy(model, copies, lambda activation: activation.detach().clone(), hooks)


def duplicate_on_meta(model: nn.Module) -> Any:
    """Like :func:`duplicate` without hooks, but on the meta device, where parameters and buffers take no memory."""
    copies = {id(t): _as_parameter(_on_meta(t), t) for _, t in tensors_of(model) if not is_lazy(t)}
    return _deep_copy(model, copies, _on_meta, hooks=False)


def _deep_copy(
    model: nn.Module, copies: dict[int, Tensor], copy_activation: Callable[[Tensor], Tensor], hooks: bool
) -> Any:
    """A deep copy that uses the given copies of some tensors, by their ids."""
    _check_forwards(model)
    memo: dict[int, Any] = dict(copies)
    for module in model.modules():
        for tensor in _activations(list(vars(module).values())):
            memo.setdefault(id(tensor), copy_activation(tensor))
        if not hooks:
            for name in HOOKS:
                if isinstance(vars(module).get(name), dict):
                    memo[id(vars(module)[name])] = OrderedDict()
    result = copy.deepcopy(model, memo)
    for module in [] if hooks else model.modules():
        for key, hook in module._forward_pre_hooks.items():
            if computes_weight(hook):
                memo[id(module._forward_pre_hooks)][key] = copy.deepcopy(hook, memo)
    for _, tensor in tensors_of(model):
        if type(tensor) is nn.Parameter and id(tensor) in memo:
            for name, value in vars(tensor).items():
                with suppress(Exception):  # uncopyable objects, such as locks, are shared
                    value = copy.deepcopy(value, memo)
                setattr(memo[id(tensor)], name, value)
    return result


def _as_parameter(copied: Tensor, original: Tensor) -> Tensor:
    """The copy as a parameter if the original is one, with its ``requires_grad``."""
    if isinstance(original, nn.Parameter):
        copied = nn.Parameter(copied, original.requires_grad)
    return copied.requires_grad_(original.requires_grad)


def _activations(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """Tensors with a history that a forward kept, in nested containers: deepcopy rejects them."""
    if isinstance(value, Tensor) and not value.is_leaf:
        yield value
    elif isinstance(value, dict | list | tuple | set) and depth > 0:
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _activations(inside, depth - 1)


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def computes_weight(hook: Any) -> bool:
    """Whether torch prunes or normalizes weights, or materializes lazy parameters, by this hook."""
    utilities = any(base.__module__.startswith("torch.nn.utils.") for base in type(hook).__mro__)
    return utilities or getattr(hook, "__module__", None) == "torch.nn.modules.lazy"


def _check_forwards(model: nn.Module) -> None:
    modules = set(model.modules())

    def holds(value: Any) -> bool:
        if isinstance(value, MethodType):
            return holds(value.__self__) or holds(value.__func__)
        if isinstance(value, FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            return any(holds(inside) for inside in (*cells, *(value.__defaults__ or ())) if inside is not value)
        return isinstance(value, nn.Module) and value in modules

    for name, module in model.named_modules():
        forward = vars(module).get("forward")  # copying a method or functools.partial copies the objects it refers to
        if isinstance(forward, FunctionType) and not is_compiled(module) and holds(forward):
            raise ValueError(
                f"'{name}' has a forward of its own that calls the model's modules: a copy's would go on calling these"
            )


def route_calls(model: nn.Module, call: Callable[..., Any] | None = None) -> None:
    """Routes calls of a copy's modules to ``call(module, *args, **kwargs)``. Default: :func:`run_forward`.

    This bypasses compiled code and all hooks, including global ones. It sets an attribute of each module, so other
    models are not affected.
    """
    for module in model.modules():
        vars(module)["_compiled_call_impl"] = None
        vars(module)["_call_impl"] = partial(call or run_forward, module)


def run_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    """A call without hooks, except those that compute weights."""
    if is_compiled(module):
        return module._orig_mod(*args, **kwargs)
    for hook in tuple(module._forward_pre_hooks.values()):
        if computes_weight(hook):
            hook(module, args)
    return module.forward(*args, **kwargs)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restores the random state of torch, numpy and Python at exit."""
    numpy = sys.modules.get("numpy.random")
    states = random.getstate(), numpy.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.set_state(states[1])


class _Uncompiled:
    """Runs compiled functions eagerly while any thread is inside: torch's stance is global to all threads."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.stance: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.lock:
            if self.stance is None and "torch._dynamo" in sys.modules:  # without it nothing is compiled
                self.stance = torch.compiler.set_stance("force_eager")
                self.stance.__enter__()
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if self.inside == 0 and self.stance is not None:
                    self.stance.__exit__(None, None, None)
                    self.stance = None


uncompiled = _Uncompiled()
