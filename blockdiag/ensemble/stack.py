"""Stacks models of one architecture into one model that computes all of them at once."""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.dropout import _DropoutNd

from blockdiag._surgery.duplicate import duplicate, random_state_kept, route_calls, uncompiled
from blockdiag._surgery.elementwise import is_elementwise
from blockdiag._surgery.plain import has_hooks, has_own_forward, is_compiled
from blockdiag._surgery.sharing import tensors_of, ties
from blockdiag.ensemble.stacked_layers import (
    StackedBatchNorm1d,
    StackedLayerNorm,
    StackedLinear,
    StackedPReLU,
    StackedRMSNorm,
)

_STACKED: dict[type, Callable[[Sequence[Any]], nn.Module]] = {
    nn.Linear: StackedLinear.from_linears,
    nn.LayerNorm: StackedLayerNorm,
    nn.RMSNorm: StackedRMSNorm,
    nn.BatchNorm1d: StackedBatchNorm1d,
    nn.PReLU: StackedPReLU,
}
_OVER_FEATURES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class StackedModel(nn.Module):
    """Models of one architecture, computed at once; made by :func:`stack_models`.

    Shape:
        - Input: :math:`(*, \\text{in\\_features})`, the same for all models; or with ``stacked=True``
          :math:`(M, *, \\text{in\\_features})`, one for each.
        - Output: :math:`(M, *, \\text{out\\_features})`, as ``torch.stack([model(input) for model in models])``.

    Attributes:
        shared: the part before the models diverge, applied once to an input: reshaping.
        stacked: the model on activations :math:`(*, M, \\text{features})`.
        num_models: :math:`M`.

    Raises:
        ValueError: an input with ``stacked=True`` does not have one part for each model.

    Examples::

        >>> import torch, blockdiag
        >>> from torch import nn
        >>> ensemble = blockdiag.stack_models([nn.Sequential(nn.Linear(8, 4), nn.ReLU()) for _ in range(3)])
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([3, 32, 4])
        >>> ensemble(torch.randn(3, 32, 8), stacked=True).shape  # an input for each model
        torch.Size([3, 32, 4])
    """

    def __init__(self, shared: nn.Module, stacked: nn.Module, num_models: int, skeleton: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.stacked = stacked
        self.num_models = num_models
        self._skeleton = (skeleton,)  # on the meta device; in a tuple, it is not registered as a submodule
        self._needs_a_copy = _may_change_its_input(stacked)

    def forward(self, input: Tensor, stacked: bool = False) -> Tensor:
        if not torch.jit.is_scripting() and _is_traced(stacked):
            # torch.fx traces one branch: the traced module must reject inputs of the other.
            torch._assert(stacked ^ True, "StackedModel: traced by torch.fx, but not with stacked=True")
            stacked = False
        if stacked:
            if not torch.jit.is_scripting() and input.shape[0] != self.num_models:
                raise ValueError(
                    f"StackedModel: expected one input for each of {self.num_models} models in the first dimension, "
                    f"but got the shape {tuple(input.shape)}"
                )
            rows = torch.stack([self.shared(part) for part in input.unbind(0)], dim=-2)
        else:
            rows = _expanded(self.shared(input), self.num_models)
            if self._needs_a_copy:
                rows = rows.clone()
        return self.stacked(rows).movedim(-2, 0)

    def to_models(self) -> list[nn.Module]:
        """The models, with copies of their parameters: the inverse of :func:`stack_models`.

        Example::

            >>> import torch, blockdiag
            >>> from torch import nn
            >>> models = [nn.Sequential(nn.Linear(8, 4), nn.ReLU()) for _ in range(3)]
            >>> again = blockdiag.stack_models(models).to_models()
            >>> torch.equal(again[2][0].weight, models[2][0].weight)
            True
        """
        models = [copy.deepcopy(self._skeleton[0]) for _ in range(self.num_models)]
        for index, model in enumerate(models):
            restored: set[nn.Module] = set()
            for name, layer in (*_parts(self.shared), *_parts(self.stacked)):
                part = model.get_submodule(name)
                part.training = layer.training
                if hasattr(layer, "restore") and part not in restored:
                    layer.restore(part, index)
                    restored.add(part)
        return models


@torch.jit.unused
def _is_traced(value: Any) -> bool:
    return isinstance(value, Proxy)


def _expanded(rows: Tensor, num_models: int) -> Tensor:
    """The rows, expanded over all models: (*, num_models, features)."""
    # Broadcast with a tensor: neither torch.fx nor TorchScript can build a list of sizes.
    return torch.broadcast_tensors(rows.unsqueeze(-2), rows.new_empty([num_models, 1]))[0]


def _may_change_its_input(model: nn.Module) -> bool:
    """Whether an in-place layer may change the input, or the output may alias it."""
    is_sequence = all(type(module) is nn.Sequential for module in model.modules() if module._modules)
    hands_on = True
    for layer in (module for module in model.modules() if not module._modules):
        if getattr(layer, "inplace", False) and (hands_on or not is_sequence):
            return True
        hands_on = hands_on and isinstance(layer, (nn.Sequential, nn.Identity, nn.Dropout))
    return hands_on


def _parts(module: nn.Module, name: str = "") -> Iterator[tuple[str, Any]]:
    """All modules by all their names, but not the insides of stacked layers."""
    yield name, module
    if not hasattr(module, "restore"):
        for key, child in module._modules.items():
            if child is not None:
                yield from _parts(child, f"{name}.{key}" if name else key)


def stack_models(models: Sequence[nn.Module], example_input: Tensor | None = None) -> StackedModel:
    """Stacks models into one that computes all of them at once, with copies of their parameters.

    Supports multilayer perceptrons: :class:`torch.nn.Linear`, normalization (``LayerNorm``, ``RMSNorm``,
    ``BatchNorm1d``), elementwise activations and dropout, ``PReLU``, ``Softmax`` and the like over the last dimension,
    and ``Flatten`` at the start, in :class:`torch.nn.Sequential`. A model may have its own ``forward`` if that treats
    all dimensions but the last alike; this is checked by comparing results on an ``example_input``. For other models,
    use :func:`torch.func.stack_module_state` with :func:`torch.vmap`.

    Args:
        models: trained models of one architecture, dtype, device, mode and ``requires_grad``.
        example_input: an input of one model; required if a model has its own ``forward``.

    Returns:
        The :class:`~blockdiag.ensemble.StackedModel`, whose linear layers have one block per model.

    Raises:
        ValueError: there are no models, they differ, have parts that cannot be stacked, or compute different results
            when stacked.

    Example::

        >>> import torch, blockdiag
        >>> from torch import nn
        >>> models = [nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 4)) for _ in range(3)]
        >>> ensemble = blockdiag.stack_models(models)
        >>> x = torch.randn(32, 8)
        >>> torch.testing.assert_close(ensemble(x), torch.stack([model(x) for model in models]))
        >>> ensemble.stacked[0]
        StackedLinear(in_features=24, out_features=48, num_blocks=3, bias=True)
    """
    if not models:
        raise ValueError("stack_models: expected at least one model, but got none")
    described = [_describe(model) for model in models]
    for index, lines in enumerate(described):
        if lines != described[0]:
            pairs = itertools.zip_longest(lines, described[0], fillvalue="nothing")
            here, first = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"stack_models: expected every model to be like the first, but model {index} has {here} where the "
                f"first has {first}"
            )
    for model in models:
        _check_parts(model, example_input)

    skeleton = duplicate(models[0]).to("meta")  # attributes that are plain tensors keep their values
    # A copy of the first model: the result must not share its modules' other state.
    shared, template, sources = _split_off_flattening([duplicate(models[0]), *models[1:]])
    stacked = _stack(template, sources, {})
    result = StackedModel(shared, stacked, len(models), skeleton)
    result.training = models[0].training
    if example_input is not None:
        _check_outputs(models, result, example_input)
    return result


def _describe(model: nn.Module) -> list[str]:
    """All properties that the models must have in common, part by part; a shared part refers to its first use."""
    seen: dict[int, str] = {}
    lines = []
    for name, module in model.named_modules(remove_duplicate=False):
        again = seen.setdefault(id(module), name)
        tensors = [*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)]
        details = [
            f"{key} {tuple(t.shape)} {t.dtype} {t.device} requires_grad={t.requires_grad} {seen.setdefault(id(t), key)}"
            for key, t in tensors
        ]
        kind = repr(module) if not module._modules else type(module).__qualname__
        lines.append(f"'{name}' = {kind} training={module.training} {again} {details}")
    return lines


def _check_parts(model: nn.Module, example_input: Tensor | None) -> None:
    owner: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if owner.setdefault(parameter, name) != name:
                raise ValueError(f"stack_models: '{owner[parameter]}' and '{name}' share a parameter")
        if has_own_forward(module) or is_compiled(module):  # a compiled wrapper would call the first model
            raise ValueError(f"stack_models: '{name}' has a forward of its own, which would be lost")
        if has_hooks(module):
            raise ValueError(f"stack_models: '{name}' has hooks, which would see all models at once: remove them first")
        if type(module) in _STACKED:
            shape = getattr(module, "normalized_shape", ())
            if len(shape) > 1:
                raise ValueError(
                    f"stack_models: '{name}' normalizes over {len(shape)} dimensions; only 1 can be stacked"
                )
        elif type(module) in _OVER_FEATURES:
            if module.dim != -1:
                raise ValueError(
                    f"stack_models: '{name}' is over dimension {module.dim}; set dim=-1 where it is the last"
                )
        elif any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
            raise ValueError(f"stack_models: '{name}' is a {type(module).__name__} with tensors that cannot be stacked")
        elif module._modules or isinstance(module, _CONTAINERS):
            if type(module) not in _CONTAINERS and example_input is None:
                raise ValueError(
                    f"stack_models: '{name}' is a {type(module).__name__} with a forward of its own: give an "
                    "example_input to check the result with"
                )
        elif not is_elementwise(module) and type(module) is not nn.Flatten:
            raise ValueError(f"stack_models: '{name}' is a {type(module).__name__}, which cannot be stacked")
    for (first, _), (second, _) in ties(tensors_of(model)):
        raise ValueError(f"stack_models: '{first}' and '{second}' share memory: give one of them its own")


def _split_off_flattening(models: Sequence[nn.Module]) -> tuple[nn.Module, nn.Module, Sequence[nn.Module]]:
    """The shared part before the models diverge, and the rest of each model, under the old names."""
    first = models[0]
    if type(first) is not nn.Sequential:
        if any(isinstance(module, nn.Flatten) for module in first.modules()):
            raise ValueError("stack_models: nn.Flatten can be stacked at the start of an nn.Sequential only")
        return nn.Sequential(), first, models
    start = 0
    while start < len(first) and isinstance(first[start], (nn.Flatten, nn.Identity)):
        start += 1
    rest = [_named_part(model, start, None) for model in models]
    if any(isinstance(module, nn.Flatten) for module in rest[0].modules()):
        raise ValueError("stack_models: nn.Flatten can be stacked at the start of an nn.Sequential only")
    return _named_part(first, 0, start), rest[0], rest


def _named_part(sequence: nn.Module, start: int | None, stop: int | None) -> nn.Sequential:
    part = nn.Sequential()
    for name, module in list(sequence._modules.items())[start:stop]:  # includes modules that are used twice
        part.add_module(name, module)
    part.training = sequence.training
    return part


def _stack(template: nn.Module, sources: Sequence[nn.Module], memo: dict[nn.Module, nn.Module]) -> nn.Module:
    """A module like the template with all layers stacked; a layer that is used twice is stacked once."""
    if template in memo:
        return memo[template]
    if type(template) in _STACKED:
        stacked: Any = _STACKED[type(template)](sources).train(template.training)
    else:
        stacked = copy.copy(template)
        stacked._modules = {
            name: None if child is None else _stack(child, [getattr(source, name) for source in sources], memo)
            for name, child in template._modules.items()
        }
        for attribute, value in stacked.__dict__.items():  # hooks and the like belong to one module
            if isinstance(value, dict) and attribute != "_modules":
                stacked.__dict__[attribute] = value.copy()
    memo[template] = stacked
    return stacked


def _check_outputs(models: Sequence[nn.Module], result: StackedModel, example_input: Tensor) -> None:
    """Compares outputs in double precision, so that rounding hides no error. Disables dropout in training mode."""
    dtype = torch.promote_types(example_input.dtype, torch.float64)
    with random_state_kept(), uncompiled(), torch.no_grad():
        copies = [duplicate(model, hooks=False).to(dtype) for model in (*models, result)]
        for module in itertools.chain.from_iterable(copy.modules() for copy in copies):
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        for copy in copies:
            route_calls(copy)
        for training in (False, True):
            *precise, stacked = [copy.train(training) for copy in copies]
            input = example_input.to(dtype)
            try:
                expected = torch.stack([model(input) for model in precise])
            except Exception:
                if training:
                    continue  # such as BatchNorm's error for a single row
                raise
            try:
                torch.testing.assert_close(stacked(input), expected)
            except Exception as error:
                raise ValueError(
                    f"stack_models: stacked, the models do not compute what they compute alone, in "
                    f"{'training' if training else 'eval'} mode, perhaps because their forward does not treat all "
                    f"dimensions but the last alike: {error}"
                ) from error
