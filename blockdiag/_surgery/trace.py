"""A model's forward as a graph, traced without side effects on the model or on other models.

The graph is torch.fx's, but not the tracer: torch's own patches ``nn.Module.__call__`` and ``__getattr__`` for all
threads (pytorch#112775). This one sets attributes of a throwaway copy's modules: calls go to the tracer, and parameters
are proxies. The copy is on the meta device: it takes no memory, and nothing can depend on values.

A forward that queries types, devices or modes may behave differently with proxies: it is not traced.
"""

import copy
import dataclasses
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from blockdiag._surgery.duplicate import duplicate_on_meta, random_state_kept, route_calls, run_forward, uncompiled
from blockdiag._surgery.plain import has_hooks, is_compiled

# A forward that queries these may get different answers for proxies than for tensors.
_QUERIES = {
    *("isinstance", "type", "requires_grad", "is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled"),
    *("device", "is_cuda", "is_cpu", "is_meta", "get_device", "is_leaf", "grad_fn", "is_tensor", "is_tracing"),
}


def _queries(code: CodeType) -> bool:
    inner: Iterator[CodeType] = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return not _QUERIES.isdisjoint(code.co_names) or any(map(_queries, inner))


def seen(value: Any) -> Any:
    """Marks values in a graph that a hook observes, or that a forward keeps in an attribute."""
    return value


def _map(value: Any, function: Any) -> Any:
    """Applies the function to every fx.Proxy in the value, including containers and dataclasses."""
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
    """Traces a throwaway copy."""

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
                    vars(module)[key] = proxy  # takes precedence over the parameter
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
        if isinstance(a, torch.Tensor):  # a constant, or a parameter that bypassed the proxies
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
            if code is not None and _queries(code):
                raise TypeError(f"the forward of {kind_inside.__name__} asks what it was given, or where it runs")
        forward, args = self.create_args_for_root(kind.forward, True)
        output = forward(*args)
        for module in self.paths:
            for value in vars(module).values():
                _map(value, lambda proxy: None if proxy.node in self.read else self.look(proxy))
        self.create_node("output", "output", (self.create_arg(output),), {})
        return self.graph


def graphs(model: nn.Module) -> list[fx.Graph]:
    """The model's forward in its current mode, in training and in eval mode; none if it cannot be traced.

    Always of the whole model: a part that can be traced alone may be used in other ways by the rest.
    """
    result = []
    try:
        with random_state_kept(), uncompiled(), torch.device("meta"):
            for mode in (None, True, False):
                copied = duplicate_on_meta(model)
                pairs = zip(model.modules(), copied.modules(), strict=True)
                hooked = {new for old, new in pairs if has_hooks(old)}
                if mode is not None:
                    copied.train(mode)
                result.append(_Tracer(copied, hooked).run())
    except Exception:  # the user's code, given proxies, may raise anything
        return []
    return result
