"""The weight of a layer of factors: multiplied out when something computes with it, and not before.

Models read the dtype, the device or the shape of a layer's weight, as transformers' T5 does in every forward pass. That
must not cost the product that the factors are there to save.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any_only, tree_map_only

# What is known without the product, as torch asks for it: methods, and attributes.
_METHODS = "__len__ dim element_size is_complex is_contiguous is_floating_point ndimension nelement numel size stride"
_ATTRIBUTES = "device dtype is_cpu is_cuda is_meta is_nested is_quantized is_sparse itemsize layout nbytes ndim shape"
_FREE = {torch.is_complex, torch.is_floating_point, torch.numel, vars(torch._C.TensorBase)["requires_grad"].__get__}
_FREE |= {getattr(Tensor, name) for name in _METHODS.split()}
_FREE |= {getattr(Tensor, name).__get__ for name in _ATTRIBUTES.split()}

_last_read: weakref.WeakKeyDictionary[nn.Module, Callable[[], "Product | None"]] = weakref.WeakKeyDictionary()


class Product(Tensor):
    """A tensor whose values are computed when they are used, and are those of when it was read."""

    _multiply: Callable[[], Tensor]
    _factors: Sequence[Tensor]
    _versions: list[int]
    _product: Tensor | None

    @staticmethod
    def __new__(cls, multiply: Callable[[], Tensor], factors: Sequence[Tensor], shape: Sequence[int]) -> "Product":
        requires_grad = torch.is_grad_enabled() and any(factor.requires_grad for factor in factors)
        self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=factors[0].dtype, device=factors[0].device, requires_grad=requires_grad
        )
        self._multiply, self._factors, self._product = multiply, factors, None
        self._versions = [factor._version for factor in factors]
        return self

    def multiplied(self) -> Tensor:
        """The product itself."""
        if self._product is None:
            if self._versions != [factor._version for factor in self._factors]:
                raise RuntimeError(
                    "blockdiag: expected the factors of a weight to be as they were when it was read, but they were "
                    "changed since: read it again, or keep a .clone()"
                )
            with torch.set_grad_enabled(self.requires_grad):
                self._product = self._multiply()
        return self._product

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Product, Product.multiplied, (args, kwargs or {}))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Where __torch_function__ was not asked, as of an argument of torch.vmap; autograd has not seen the factors.
        if tree_any_only(Product, lambda product: product.requires_grad, (args, kwargs)):
            raise RuntimeError(
                f"blockdiag: {function} would miss the gradient of a weight's factors: .clone() it before"
            )
        args, kwargs = tree_map_only(Product, Product.multiplied, (args, kwargs or {}))
        return function(*args, **kwargs)


def product(
    layer: nn.Module, multiply: Callable[[], Tensor], factors: Sequence[Tensor], shape: Sequence[int]
) -> Tensor:
    """What ``multiply()`` computes, of that shape, from the factors of a layer: later, where torch lets it wait."""
    device = factors[0].device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if (
        autocast  # which decides about the dtype
        or torch.compiler.is_compiling()  # and leaves out what is not used
        or torch.jit.is_tracing()
        or any(type(factor) is not nn.Parameter or factor.is_inference() for factor in factors)
    ):
        return multiply()
    later = Product(multiply, factors, shape)
    _last_read[layer] = weakref.ref(later)
    return later


def multiply_out(layer: nn.Module) -> None:
    """Before the factors change: what was read last is what it was."""
    last = _last_read.pop(layer, lambda: None)()
    if last is not None:
        last.multiplied()
