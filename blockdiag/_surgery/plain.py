"""Whether a layer computes what its class defines, and attributes that users set on its parameters."""

from collections.abc import Callable

from torch import Tensor, nn


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks observe or change inputs or outputs."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def is_compiled(module: nn.Module) -> bool:
    """Whether the module is torch.compile's wrapper."""
    return "_orig_mod" in module._modules


def has_own_forward(module: nn.Module) -> bool:
    """Whether this instance's forward was replaced; torch.compile's wrapper does not count."""
    return not {"forward", "_call_impl"}.isdisjoint(vars(module)) and not is_compiled(module)


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """The reason why a module may not compute what `kind` does with its parameters, or None."""
    if has_own_forward(module):
        return "has a forward of its own, which would be lost"
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        name = f"{type(module).__module__}.{type(module).__qualname__}"
        return f"is a {name}, which may compute something else"
    if type(module).__call__ is not nn.Module.__call__:
        return f"is a {type(module).__qualname__} with a __call__ of its own, which would be lost"
    return "has hooks, which would be lost: remove them first" if has_hooks(module) else None


def carry_attributes(old: Tensor, new: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> None:
    """Copies user attributes of a parameter, such as ``no_weight_decay``, to another one.

    A tensor of the parameter's shape, such as a mask, is mapped by `gather`, or dropped without it.
    """
    for name, value in vars(old).items():
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape == old.shape:
            if gather is None:
                continue
            value = gather(value)
        setattr(new, name, value)
