"""What a model's forward does, as a graph, without touching the model or others.

The recording is torch.fx's, its tracer is not: that one exchanges ``nn.Module.__call__`` and ``__getattr__`` for all
threads (pytorch#112775). Here a throwaway copy has stand-ins in its modules' own attributes: calls lead to the tracer,
parameters are what it records. The copy is on the meta device: it takes no memory, and nothing can depend on values.

A forward that asks what it was given, or where it runs, may do otherwise with stand-ins: it is not traced.
"""

import copy
import dataclasses
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from blockdiag._surgery.duplicate import duplicate, random_state_kept, route_calls, run_forward, uncompiled
from blockdiag._surgery.plain import has_hooks, is_compiled

# What a forward may ask for, and gets another answer to than with tensors.
_QUESTIONS = {
    *("isinstance", "type", "requires_grad", "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"),
    *("device", "is_cuda", "is_cpu", "is_meta", "get_device", "is_leaf", "grad_fn", "is_tensor", "is_tracing"),
}


def _asks(code: CodeType) -> bool:
    inner: Iterator[CodeType] = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return not _QUESTIONS.isdisjoint(code.co_names) or any(map(_asks, inner))


def seen(value: Any) -> Any:
    """Stands in a graph for somebody who looks on: a hook, or whoever reads what a forward kept."""
    return value


def _map(value: Any, function: Any) -> Any:
    """The value with the function applied to every fx.Proxy in it, in containers and dataclasses too."""
    if isinstance(value, fx.Proxy):
        return function(value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_map(item, function) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(item, function) for item in value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        mapped = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(mapped, field.name, _map(getattr(value, field.name, None), function))
        return mapped
    return value


class _Tracer(fx.Tracer):
    """Records what a copy computes."""

    def __init__(self, copied: nn.Module, hooked: set[nn.Module]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.copied, self.hooked = copied, hooked
        self.paths = {module: name for name, module in copied.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in copied.named_parameters()}
        self.read: set[fx.Node] = set()
        for module, path in self.paths.items():
            for key in module._parameters:
                if module._parameters[key] is not None:
                    proxy = self.create_proxy("get_attr", f"{path}.{key}", (), {})
                    self.read.add(proxy.node)
                    vars(module)[key] = proxy  # found before the parameter itself
        route_calls(copied, self.call)

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        hooked = module in self.hooked
        if hooked:
            args, kwargs = _map(args, self.look), _map(kwargs, self.look)
        if self.is_leaf_module(module, self.paths[module]):
            output: Any = self.create_proxy("call_module", self.paths[module], args, kwargs)
        else:
            output = run_forward(module, *args, **kwargs)
        return _map(output, self.look) if hooked else output

    def look(self, proxy: fx.Proxy) -> fx.Proxy:
        return self.create_proxy("call_function", seen, (proxy,), {})

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, torch.Tensor):  # a parameter by another way, or a constant
            return self.create_node("get_attr", self.parameters.get(id(a), "constant"), (), {})
        return super().create_arg(a)

    def run(self) -> fx.Graph:
        entry: Any = self.copied
        while is_compiled(entry):
            entry = entry._orig_mod
        kind = type(entry)
        if "forward" in vars(entry) or kind.__call__ is not nn.Module.__call__:
            raise TypeError(f"a call of {kind.__name__} is not its class's forward")
        self.root = entry
        for kind_inside in {type(module) for module in self.paths if not type(module).__module__.startswith("torch.")}:
            code = getattr(kind_inside.forward, "__code__", None)
            if code is not None and _asks(code):
                raise TypeError(f"the forward of {kind_inside.__name__} asks what it was given, or where it runs")
        forward, args = self.create_args_for_root(kind.forward, True)
        output = forward(*args)
        for module in self.paths:
            for value in vars(module).values():
                _map(value, lambda proxy: None if proxy.node in self.read else self.look(proxy))
        self.create_node("output", "output", (self.create_arg(output),), {})
        return self.graph


def graphs(model: nn.Module) -> list[fx.Graph]:
    """What the model's forward does as it is, in training and in eval mode; nothing if that depends on its input.

    Of the whole model: a part that could be traced by itself may be used by others in another way.
    """
    result = []
    try:
        with random_state_kept(), uncompiled(), torch.device("meta"):
            for mode in (None, True, False):
                copied = duplicate(model, hooks=False, meta=True)
                pairs = zip(model.modules(), copied.modules(), strict=True)
                hooked = {new for old, new in pairs if has_hooks(old)}
                if mode is not None:
                    copied.train(mode)
                result.append(_Tracer(copied, hooked).run())
    except Exception:  # this runs the user's code, on what is no tensor: anything may come of it
        return []
    return result
