"""Shared modules and parameters: modules with several names, and parameters of several modules, tied or aliasing."""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

Named = tuple[str, Tensor]


def names_by_module(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module of the model with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def storage_key(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Identifies the tensor's storage; None if it has none, or is not a plain strided tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_meta or tensor.numel() == 0:
        return None
    return tensor.device, tensor.untyped_storage().data_ptr()


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the tensor's first byte, and of the byte past its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors whose spans meet share an element: columns of one matrix do not."""
    size, start = first.element_size(), min(first.data_ptr(), second.data_ptr())
    if size != second.element_size():
        return True
    end = max(_span(first)[1], _span(second)[1])
    taken = torch.zeros((end - start) // size, dtype=torch.bool)
    views = [taken.as_strided(t.shape, t.stride(), (t.data_ptr() - start) // size) for t in (first, second)]
    views[0].fill_(True)
    return bool(views[1].any())


def tensors_of(model: nn.Module) -> Iterator[Named]:
    """All parameters, buffers and tensor attributes of a model's modules, under every name."""
    for prefix, module in model.named_modules():
        for names in (module._parameters, module._buffers, vars(module)):
            for key, value in names.items():
                if isinstance(value, Tensor):
                    yield f"{prefix}.{key}" if prefix else key, value


def ties(named: Iterable[Named]) -> Iterator[tuple[Named, Named]]:
    """Pairs of different tensors that overlap in memory."""
    storages: dict[object, dict[int, Named]] = {}
    for name, tensor in named:
        key = storage_key(tensor)
        if key is not None:
            storages.setdefault(key, {}).setdefault(id(tensor), (name, tensor))
    for inside in storages.values():
        ordered = sorted(inside.values(), key=lambda item: _span(item[1]))
        for index, first in enumerate(ordered):
            for second in ordered[index + 1 :]:
                if _span(second[1])[0] >= _span(first[1])[1]:
                    break
                if _overlap(first[1], second[1]):
                    yield first, second


def check_sharing(model: nn.Module, names: Mapping[nn.Module, str]) -> None:
    """Raises if a parameter of these layers also belongs to a module that stays, such as an embedding.

    Or if it aliases another tensor: copies and new parameters would untie them.
    """
    inside = {part for layer in names for part in layer.modules()}
    replaced = {parameter: name for layer, name in names.items() for parameter in layer.parameters()}
    for name, module in model.named_modules():
        if module in inside:
            continue
        for key, parameter in [*module._parameters.items(), *vars(module).items()]:
            if isinstance(parameter, nn.Parameter) and parameter in replaced:
                raise ValueError(
                    f"'{replaced[parameter]}' shares a parameter with '{name}.{key}', which is not converted with it: "
                    "leave it out, or give it a copy of its own"
                )
    for (first, tensor), (second, other) in ties(tensors_of(model)):
        if tensor in replaced or other in replaced:
            raise ValueError(
                f"'{first}' and '{second}' share memory without being one Parameter: make them one, or give one "
                "of them a copy of its own"
            )
