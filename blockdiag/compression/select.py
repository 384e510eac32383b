"""Which layers of a model a policy names, and whether they can be converted at all: checked before any work."""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from blockdiag._surgery.plain import has_own_forward, why_not_plain
from blockdiag._surgery.sharing import check_sharing
from blockdiag.nn import BlockDiagLinear, LowRankConv, LowRankLinear, MonarchLinear, PermutedBlockDiagLinear

# How layers are named: a glob on module names, a regular expression to search them for, several of these, a mapping of
# these to a setting, or a function of name and layer that returns whether to convert it, or its setting.
Pattern = str | re.Pattern[str]
Policy = Pattern | Sequence[Pattern] | Mapping[Pattern, int] | Callable[[str, Any], bool | int | None]

IN_ATTENTION = "torch.nn.MultiheadAttention reads its weight, and never calls it: apply blockdiag.split_attention first"
LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)  # the latter is nn.MultiheadAttention's out_proj
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FACTORS = (LowRankLinear, LowRankConv, MonarchLinear)
CONVERTED = (BlockDiagLinear, PermutedBlockDiagLinear, *FACTORS)


@dataclass
class Selected:
    """Layers that share one weight, most often a single one, and the setting that the policy gave them."""

    setting: int | None
    layers: list[nn.Module] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)  # of each layer, all of them

    @property
    def layer(self) -> Any:
        return self.layers[0]

    @property
    def name(self) -> str:
        return self.names[0][0]


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by all their names, but not what is inside converted layers."""
    yield name, module
    if not isinstance(module, CONVERTED):
        for key, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{name}.{key}" if name else key)


def _matches(pattern: Pattern, name: str) -> bool:
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.search(name) is not None


def _as_function(policy: Policy) -> tuple[Callable[[str, Any], bool | int | None], dict[Pattern, bool]]:
    """The policy as a function, and which of its patterns that function has found."""
    if callable(policy) and not isinstance(policy, str | re.Pattern):
        return policy, {}
    if isinstance(policy, str | re.Pattern):
        settings: dict[Pattern, bool | int] = {policy: True}
    elif isinstance(policy, Mapping):
        settings = dict(policy)
    else:
        settings = dict.fromkeys(policy, True)
    for pattern in settings:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(f"expected a policy of names and patterns, but got {pattern!r}")
    found = dict.fromkeys(settings, False)

    def choose(name: str, layer: Any) -> bool | int | None:
        hits = [pattern for pattern in settings if _matches(pattern, name)]
        found.update(dict.fromkeys(hits, True))
        return settings[hits[0]] if hits else None

    return choose, found


def _as_setting(name: str, value: Any) -> bool | int | None:
    """What a policy returned for the layer of this name: whether to convert it, or a number."""
    if value is None or isinstance(value, bool):
        return value
    if str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return bool(value)
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"expected the policy to return a bool, an int or None for '{name}', but got {value!r}"
        ) from None


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "in_features")


def _check(name: str, layer: Any, values: bool = True) -> None:
    """Raises if the layer's parameters are not plain dense ones that can be read and replaced."""
    if _is_quantized(layer):
        raise ValueError(f"'{name}' is quantized: convert the model first, then quantize it")
    if parametrize.is_parametrized(layer):
        raise ValueError(f"'{name}' is parametrized: remove it by torch.nn.utils.parametrize.remove_parametrizations")
    check_parts(name, layer)
    own = dict(layer.named_parameters(recurse=False))
    if not isinstance(layer, CONVERTED) and set(own) != ({"weight"} if layer.bias is None else {"weight", "bias"}):
        raise ValueError(
            f"'{name}' has parameters {sorted(own)} in place of weight and bias: remove pruning or weight and spectral "
            "normalisation first"
        )
    check_parameters(name, layer, values)


def check_parts(name: str, layer: nn.Module) -> None:
    """Raises if the layer, or one inside, computes something else than its class, or has what would be lost."""
    if has_own_forward(layer):
        raise ValueError(f"'{name}' has a forward of its own, which would be lost")
    for inner, part in layer.named_modules():
        if part is layer:
            continue
        if parametrize.is_parametrized(part):
            raise ValueError(f"'{name}.{inner}' is parametrized: remove that first")
        reason = why_not_plain(part, type(part))
        if type(part) not in (*LINEARS, *CONVOLUTIONS, BlockDiagLinear):
            reason = f"is a {type(part).__qualname__}, which would be lost"
        if reason is not None:
            raise ValueError(f"'{name}.{inner}' {reason}")


def check_parameters(name: str, layer: nn.Module, values: bool = True) -> None:
    """Raises if a parameter is not one of plain numbers, finite if its `values` matter, or has hooks."""
    for key, parameter in layer.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"'{name}' is lazy, its sizes not known yet: run the model on a batch first")
        if parameter.is_meta:
            raise ValueError(f"'{name}' is on the meta device and has no values: load the model first")
        if type(parameter) is not nn.Parameter or not (parameter.is_floating_point() or parameter.is_complex()):
            raise ValueError(
                f"'{name}.{key}' is a {type(parameter).__name__} of {parameter.dtype}, no plain parameter: "
                "convert the model before it is sharded or quantized"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"'{name}.{key}' has hooks of its own, which a parameter of another shape cannot take over"
            )
        with torch.no_grad():  # also of one that was made in inference mode
            finite = not values or bool(parameter.isfinite().all())
        if not finite:
            raise ValueError(f"'{name}.{key}' has NaN or infinite values")


def select(model: nn.Module, policy: Policy, kinds: tuple[type, ...]) -> tuple[list[Selected], dict[str, str]]:
    """The layers of these kinds that the policy names, by shared weight, and why others that it names are left alone.

    Raises:
        ValueError: the policy, or one of its patterns, matches nothing, names a part of what is shared, or names a
            layer that cannot be converted.
    """
    choose, found = _as_function(policy)
    skipped: dict[str, str] = {}
    converted: list[str] = []
    settings: dict[nn.Module, dict[str, bool | int | None]] = {}
    for name, module in _walk(model):
        if type(module) in kinds or _is_quantized(module) or parametrize.is_parametrized(module):
            if not isinstance(module, (nn.Linear, *kinds)) and not _is_quantized(module):
                continue
            settings.setdefault(module, {})[name] = _as_setting(name, choose(name, module))
        elif isinstance(module, CONVERTED):
            converted.append(name)
        elif isinstance(module, kinds) and _as_setting(name, choose(name, module)) not in (None, False):
            if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
                _check(name, module)
            skipped[name] = f"a {type(module).__module__}.{type(module).__qualname__} may compute something else"

    chosen: dict[nn.Module, Selected] = {}
    by_weight: dict[nn.Parameter, Selected] = {}
    for module, by_name in settings.items():
        names, values = list(by_name), list(by_name.values())
        if all(value is None or value is False for value in values):
            continue
        if any(value != values[0] for value in values):
            raise ValueError(f"{names} are one layer, but the policy treats them differently")
        _check(names[0], module)
        value = values[0]
        setting = None if isinstance(value, bool) else value
        # The first parameter is the weight, or that of the first factor.
        selected = by_weight.setdefault(next(module.parameters()), Selected(setting))
        if selected.layers and (selected.setting != setting or type(module) is not type(selected.layer)):
            raise ValueError(
                f"'{selected.name}' and '{names[0]}' share a weight, but the policy treats them differently"
            )
        selected.layers.append(module)
        selected.names.append(names)
        chosen[module] = selected

    hint = f"; converted already: {converted}" if converted else ""
    for pattern, hit in found.items():
        if not hit:
            others = [f"'{n}' is a {type(m).__qualname__}" for n, m in _walk(model) if n and _matches(pattern, n)]
            hint += f"; {', '.join(others[:3])}" if others else ""
            raise ValueError(f"the policy's {pattern!r} matches no layer that could be converted{hint}")
    if not chosen:
        reasons = "".join(f"; '{name}': {reason}" for name, reason in skipped.items())
        raise ValueError(f"the policy matches no layer that could be converted{hint}{reasons}")
    check_sharing(model, {layer: selected.name for layer, selected in chosen.items()})
    return list({id(selected): selected for selected in chosen.values()}.values()), skipped


def has_parameters_to_itself(model: nn.Module, layer: nn.Module) -> bool:
    """Whether it is a plain nn.Linear whose parameters no other module has, whatever their values.

    And without tensors of another kind, such as a mask, which would stay in the old order.
    """
    if (
        type(layer) is not nn.Linear
        or layer._buffers
        or any(isinstance(value, Tensor) for value in vars(layer).values())
    ):
        return False
    try:
        _check("", layer, values=False)
        check_sharing(model, {layer: ""})
    except ValueError:
        return False
    return True


def attention_projections(model: nn.Module) -> set[nn.Module]:
    """The output projections of torch.nn.MultiheadAttention: it reads their weight, and never calls them."""
    return {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
