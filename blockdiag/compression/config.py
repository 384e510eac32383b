"""What a kind of layer provides so that :func:`blockdiag.compress` makes it: a config that builds layers."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import nn

from blockdiag._surgery.optimizers import Reordering
from blockdiag._surgery.replacement import Replacement
from blockdiag.compression.numerics.moments import Moments, add_moments
from blockdiag.compression.report import Step


@dataclass
class Selected:
    """Layers that share one weight, most often a single one, with their config."""

    config: Any  # a Config
    in_attention: bool  # whether torch.nn.MultiheadAttention reads the weight, and never calls the layer
    layers: list[nn.Module] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)  # of each layer, all of them

    @property
    def layer(self) -> Any:
        return self.layers[0]

    @property
    def name(self) -> str:
        return self.names[0][0]

    @property
    def all_have_bias(self) -> bool:
        return all(layer.bias is not None for layer in self.layers)

    @property
    def share_bias(self) -> bool:
        return len({layer.bias for layer in self.layers}) < len(self.layers)  # type: ignore[arg-type]

    def merged(self, moments: Mapping[nn.Module, Moments]) -> Moments | None:
        """The moments of all layers together; None if those of one are not known."""
        known = [moments[layer] for layer in self.layers if layer in moments]
        return add_moments(known) if len(known) == len(self.layers) else None


class Change(NamedTuple):
    """The replacement of one layer, and the steps of its projection with their errors."""

    replacement: Replacement
    steps: list[Step]


# From layers that share a weight to their changes, or to the reason to leave them alone.
Build = Callable[[Selected], list[Change] | str]


class Config(ABC):
    """How :func:`blockdiag.compress` compresses layers: the base class of all configs.

    A new kind of layer is a subclass, a frozen dataclass of what the user decides, with the class attributes and
    methods below. :func:`~blockdiag.compress` calls the methods in the order in which they stand here.

    Attributes:
        takes: the layers that it compresses, by their exact class: dense ones, and compressed ones to compress further.
        makes: the classes of compressed layers that it returns.

    Example::

        >>> from blockdiag.compression import BlockDiagonal, Config, LowRank
        >>> isinstance(LowRank(), Config), LowRank(rank=8) == LowRank(rank=8.0)
        (True, True)
        >>> {BlockDiagonal(4): "hashable"}[BlockDiagonal(num_blocks=4)]
        'hashable'
    """

    takes: ClassVar[tuple[type[nn.Module], ...]]
    makes: ClassVar[tuple[type[nn.Module], ...]]
    _made: ClassVar[list[type[nn.Module]]] = []

    def __init_subclass__(cls) -> None:
        Config._made.extend(cls.__dict__.get("makes", ()))

    @staticmethod
    def compressed_kinds() -> tuple[type[nn.Module], ...]:
        """The classes of compressed layers of all configs."""
        return tuple(Config._made)

    @abstractmethod
    def check_budget(self, budget: float | None) -> None:
        """Raises if the budget contradicts the config's fields, or is missing."""

    @abstractmethod
    def check(self, selected: Selected, budget: float | None) -> str | None:
        """Looks at the sizes of selected layers before any work is done.

        Returns:
            The reason to leave the layers alone, if there is one.

        Raises:
            ValueError: the layers cannot be of this structure.
        """

    @staticmethod
    @abstractmethod
    def plan(chosen: Sequence[Selected], moments: Mapping[nn.Module, Moments], budget: float | None) -> Build:
        """Decides on sizes that depend on all chosen layers, such as ranks within a budget.

        Layers of different configs are planned together if the configs have the same function here.

        Args:
            chosen: the layers, each with its config.
            moments: those of the inputs of each layer, where there is calibration.
            budget: the budget that all of them share.

        Returns:
            The function that builds what replaces the layers, called for one after the other.
        """

    @staticmethod
    def finish(model: nn.Module, changes: Sequence[Change]) -> list[Reordering]:
        """Sees all changes, of other configs too, before they are made; not in a dry run.

        Returns:
            Parameters that stay but take another order.
        """
        return []


def too_small(layer: Any, min_features: int) -> str | None:
    """The reason to leave a dense layer alone that has fewer inputs or outputs; channels of a convolution."""
    if isinstance(layer, nn.Linear):
        sizes, what = (layer.in_features, layer.out_features), "features"
    else:
        sizes, what = (layer.in_channels, layer.out_channels), "channels"
    return f"fewer than {min_features} {what}" if min(sizes) < min_features else None


def as_whole(config: Config | None, name: str, value: Any, least: int) -> int:
    """The value of a config's field, or of another argument, as an int.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than `least`.
    """
    owner = "" if config is None else f"{type(config).__name__}: "
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}expected {name} to be an int, but got {value!r}") from None
    if whole < least:
        raise ValueError(f"{owner}expected {name} to be at least {least}, but got {value}")
    return whole


def as_number(what: str, value: Any) -> float:
    """The value as an int or float.

    Raises:
        TypeError: it is not a number.
    """
    if not isinstance(value, bool | str):
        for convert in (operator.index, float):
            with suppress(TypeError, ValueError):
                return convert(value)
    raise TypeError(f"expected {what} to be a number, but got {value!r}")


def set_field(config: Config, name: str, value: Any) -> None:
    """Sets a field of a frozen config while it is made: values are kept in one form, so that equal ones are equal."""
    object.__setattr__(config, name, value)
