"""Which layers of a model get which config: by patterns, or by a function."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from blockdiag._surgery.sharing import check_sharing
from blockdiag.compression.checks import attention_projections, check_layer, is_quantized
from blockdiag.compression.config import Config, Selected

# A glob on names of modules, a regular expression to search them for, or a class of layers.
LayerPattern = str | re.Pattern[str] | type[nn.Module]
# Several of these, or a function of name and layer that returns whether to compress it.
Layers = LayerPattern | Iterable[LayerPattern] | Callable[[str, Any], Any]


@dataclass(eq=False)
class Rule:
    """What the layers that a pattern or a function chooses become; None if they are left alone."""

    chooses: LayerPattern | Callable[[str, Any], Any]
    config: Config | None

    def matches(self, name: str, module: nn.Module) -> bool:
        if isinstance(self.chooses, str):
            return fnmatchcase(name, self.chooses)
        if isinstance(self.chooses, re.Pattern):
            return self.chooses.search(name) is not None
        if isinstance(self.chooses, type):
            return isinstance(module, self.chooses)
        answer = self.chooses(name, module)
        if not isinstance(answer, bool | None) and str(getattr(answer, "dtype", "")) not in ("bool", "torch.bool"):
            raise TypeError(f"expected layers to return a bool for '{name}', but got {answer!r}")
        return bool(answer)


def as_rules(config: Config | Mapping[LayerPattern, Config | None], layers: Layers) -> list[Rule]:
    """The rules that ``config`` and ``layers`` of :func:`blockdiag.compress` stand for.

    Raises:
        TypeError: one of them is of another type.
        ValueError: both choose layers.
    """
    if isinstance(layers, Mapping):
        raise TypeError("expected layers to be patterns or a function, but got a mapping: pass it as config")
    if isinstance(layers, nn.Module) or not (callable(layers) or isinstance(layers, re.Pattern | Iterable)):
        raise TypeError(f"expected layers to be patterns or a function, but got {layers!r}")
    by_function = callable(layers) and not isinstance(layers, type)
    if isinstance(config, Mapping):
        if not (isinstance(layers, str) and layers == "*"):
            raise ValueError("a mapping of patterns to configs chooses the layers itself: leave out layers")
        rules = [Rule(pattern, each) for pattern, each in config.items()]
    elif by_function or isinstance(layers, str | re.Pattern | type):
        rules = [Rule(layers, config)]  # type: ignore[arg-type]
    else:
        rules = [Rule(pattern, config) for pattern in layers]  # type: ignore[union-attr]
    for rule in rules:
        is_kind = isinstance(rule.chooses, type) and issubclass(rule.chooses, nn.Module)
        if not (by_function or is_kind or isinstance(rule.chooses, str | re.Pattern)):
            raise TypeError(f"expected a glob, a regular expression or a class of layers, but got {rule.chooses!r}")
        if not (isinstance(rule.config, Config) or (rule.config is None and isinstance(config, Mapping))):
            raise TypeError(
                f"expected a config such as blockdiag.LowRank(), or a mapping of patterns to configs, but got "
                f"{rule.config!r}"
            )
    return rules


def select(model: nn.Module, rules: Sequence[Rule]) -> tuple[list[Selected], dict[str, str]]:
    """The layers that the rules choose, by shared weight, and why others that they choose are left alone.

    Raises:
        ValueError: nothing is chosen, or a pattern matches nothing; only a part is chosen of what is shared, or a layer
            that cannot be converted.
    """
    takes = {kind for rule in rules if rule.config is not None for kind in rule.config.takes}
    kinds = (*takes, *Config.compressed_kinds())
    skipped: dict[str, str] = {}
    compressed: dict[str, nn.Module] = {}
    found: set[Rule] = set()
    configs: dict[nn.Module, dict[str, Config | None]] = {}
    for name, module in _walk(model):
        if not isinstance(module, kinds) and not is_quantized(module):
            continue
        hits = [rule for rule in rules if rule.matches(name, module)]
        found.update(rule for rule in hits if rule.config is None or _concerns(rule.config, module))
        config = hits[0].config if hits else None
        if isinstance(module, Config.compressed_kinds()):
            compressed[name] = module
        reason = None if config is None else _why_not(config, module)
        if reason is None:
            configs.setdefault(module, {})[name] = config
        else:
            if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
                check_layer(name, module)
            skipped[name] = reason

    chosen = _by_weight(configs, attention_projections(model))
    hint = f"; compressed already: {list(compressed)}" if compressed else ""
    for rule in rules:
        if rule not in found and not (callable(rule.chooses) and not isinstance(rule.chooses, type)):
            others = [f"'{n}' is a {type(m).__qualname__}" for n, m in _walk(model) if n and rule.matches(n, m)]
            hint += f"; {', '.join(others[:3])}" if others else ""
            raise ValueError(f"the pattern {rule.chooses!r} matches no layer that could be compressed{hint}")
    if not chosen:
        reasons = "".join(f"; '{n}': {reason}" for n, reason in skipped.items() if n not in compressed)
        raise ValueError(f"the choice of layers matches no layer that could be compressed{hint}{reasons}")
    check_sharing(model, {layer: selected.name for selected in chosen for layer in selected.layers})
    return chosen, skipped


def _walk(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by all their names, but not what is inside compressed layers."""
    yield name, module
    if not isinstance(module, Config.compressed_kinds()):
        for key, child in module._modules.items():
            if child is not None:
                yield from _walk(child, f"{name}.{key}" if name else key)


def _concerns(config: Config, module: nn.Module) -> bool:
    """Whether a pattern for this config that matches the module is no mistake."""
    return isinstance(module, (*config.takes, *Config.compressed_kinds())) or is_quantized(module)


def _why_not(config: Config, module: nn.Module) -> str | None:
    """The reason to leave a layer alone that a rule chooses for this config; None if it is to be compressed."""
    exact = type(module) in config.takes
    if exact or is_quantized(module) or (parametrize.is_parametrized(module) and isinstance(module, config.takes)):
        return None  # or an error, which says what to do
    if isinstance(module, Config.compressed_kinds()):
        return f"compressed already: {type(config).__name__} takes no {type(module).__name__}"
    if isinstance(module, config.takes):
        return f"a {type(module).__module__}.{type(module).__qualname__} may compute something else"
    return f"{type(config).__name__} takes no {type(module).__name__}"


def _by_weight(
    configs: Mapping[nn.Module, Mapping[str, Config | None]], in_attention: set[nn.Module]
) -> list[Selected]:
    """The layers that have a config, those that share a weight together."""
    by_weight: dict[nn.Parameter, Selected] = {}
    for module, by_name in configs.items():
        names, given = list(by_name), list(by_name.values())
        config = given[0]
        if any(other != config for other in given):
            raise ValueError(f"{names} are one layer, but get different configs")
        if config is None:
            continue
        check_layer(names[0], module)
        # The first parameter is the weight, or that of the first factor.
        weight = next(module.parameters())
        selected = by_weight.setdefault(weight, Selected(config, in_attention=False))
        if selected.layers and (selected.config != config or type(module) is not type(selected.layer)):
            raise ValueError(f"'{selected.name}' and '{names[0]}' share a weight, but get different configs")
        selected.in_attention |= module in in_attention
        selected.layers.append(module)
        selected.names.append(names)
    return list(by_weight.values())
