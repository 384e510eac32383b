"""Computes TorchUncertainty's packed linear layers with blockdiag, without changes in the code that uses them.

:func:`install` routes ``PackedLinear``, and the projections of ``PackedMultiheadAttention`` and of the packed
transformer layers, to blockdiag, for every ``implementation``; packed convolutions and norms stay the library's.
:func:`uninstall` reverts it, and :func:`installed` does both around a block of code. Classes, parameters, state dicts
and pickles stay TorchUncertainty's: only the function ``packed_linear`` is replaced, so existing layers benefit too.
Calls that blockdiag does not support, or that the library rejects, fall back to the library's function.

While installed, layers also load checkpoints of other implementations and of other versions of the library, back to
0.1; :func:`convert_state_dict` does only that.

One result differs: the gradient of ``implementation="sparse"`` is sparse, like the weight. The library's own is dense,
and no optimizer of PyTorch can apply it.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import blockdiag
from blockdiag._load import extension

__all__ = ["convert_state_dict", "install", "installed", "uninstall"]

_MODULE = "torch_uncertainty.layers.packed"
_BLOCKS = ("full", "einsum", "conv1d")  # the implementations whose weight is (num_groups, out_block, in_block)
_MISSING: Any = object()
# Owner, attribute, original value. Kept in the compiled module, which outlives a second import of the package.
_replaced: list[tuple[Any, str, Any]] = vars(extension).setdefault("replaced_in_torch_uncertainty", [])


def _packed() -> ModuleType:
    """The library's module of packed layers.

    Raises:
        ImportError: the library is not installed, or older than 0.5.
    """
    message = (
        "blockdiag.integrations.torch_uncertainty needs TorchUncertainty 0.5 or newer: pip install torch-uncertainty"
    )
    try:
        packed = importlib.import_module(_MODULE)
    except ImportError as error:
        raise ImportError(f"{message} ({error})") from error
    if not hasattr(packed, "packed_linear"):
        raise ImportError(message)
    return packed


def install() -> None:
    """Routes packed linear layers and packed attention projections to blockdiag. Idempotent.

    Raises:
        ImportError: TorchUncertainty is not installed, or older than 0.5.

    Example::

        >>> import torch
        >>> from torch_uncertainty.layers.packed import PackedLinear
        >>> from blockdiag.integrations import torch_uncertainty
        >>> layer = PackedLinear(256, 128, alpha=2, num_estimators=4)
        >>> torch_uncertainty.install()
        >>> layer(torch.randn(32, layer.groups * layer.weight.shape[-1])).shape  # existing layers use it too
        torch.Size([32, 256])
        >>> torch_uncertainty.uninstall()
    """
    if _replaced:
        return
    packed = _packed()
    original = packed.packed_linear
    replacement = _replacement(original)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "torch_uncertainty":
            # Modules that imported the function by name hold their own references.
            for key in [key for key, value in vars(module).items() if value is original]:
                _replace(module, key, replacement)
    for kind, convert in (
        (packed.PackedLinear, _convert_linear),
        (packed.PackedMultiheadAttention, _convert_attention),
    ):
        _replace(kind, "_load_from_state_dict", _converting(kind._load_from_state_dict, convert))


def uninstall() -> None:
    """Reverts :func:`install`. Idempotent.

    Example::

        >>> from blockdiag.integrations import torch_uncertainty
        >>> torch_uncertainty.install()
        >>> torch_uncertainty.uninstall()
    """
    while _replaced:
        owner, name, value = _replaced.pop()
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """A context manager that installs within a ``with`` block and then restores the previous state.

    Raises:
        ImportError: TorchUncertainty is not installed, or older than 0.5.

    Example::

        >>> import torch
        >>> from torch_uncertainty.layers.packed import PackedLinear
        >>> from blockdiag.integrations import torch_uncertainty
        >>> layer = PackedLinear(256, 128, alpha=2, num_estimators=4, first=True)
        >>> with torch_uncertainty.installed():
        ...     output = layer(torch.randn(32, 256))
    """
    before = bool(_replaced)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _replace(owner: Any, name: str, value: Any) -> None:
    _replaced.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)


def _replacement(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def packed_linear(
        inputs: Tensor, weight: Tensor, num_groups: int, implementation: str, bias: Tensor | None = None
    ) -> Tensor:
        blocks: Tensor | None = None
        if implementation in _BLOCKS:
            blocks = weight
        elif implementation == "sparse":
            blocks = _sparse_blocks(weight, num_groups)
        if blocks is not None and _is_ours(inputs, blocks, num_groups, bias):
            return torch.ops.blockdiag.linear(inputs, blocks, bias)
        return original(inputs, weight, num_groups, implementation, bias)

    return packed_linear


def _is_ours(inputs: Tensor, blocks: Tensor, num_groups: int, bias: Tensor | None) -> bool:
    """Whether the library and our op both support these arguments, with the same meaning."""
    tensors = [inputs, blocks] if bias is None else [inputs, blocks, bias]
    if blocks.dim() != 3 or any(t.layout != torch.strided or t.device != blocks.device for t in tensors):
        return False
    sizes = (num_groups * blocks.shape[1], num_groups * blocks.shape[2])
    device = blocks.device.type
    return (
        blocks.shape[0] == num_groups
        and inputs.dim() >= 1
        and inputs.shape[-1] == sizes[1]  # our op also takes (*, num_groups, in_block)
        and (bias is None or bias.shape == (sizes[0],))
        and (device in ("cpu", "meta") or (device == "cuda" and blockdiag.build_info()["cuda"] != "none"))
        and (all(t.dtype == blocks.dtype for t in tensors) or _casts(device))
        and (blocks.is_floating_point() or blocks.is_complex())
    )


def _casts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _sparse_blocks(weight: Tensor, num_groups: int) -> Tensor | None:
    """The blocks of a sparse weight ``(out_features, in_features)``; None if some of their elements are missing."""
    if weight.layout != torch.sparse_coo or weight.dim() != 2 or any(size % num_groups for size in weight.shape):
        return None
    out_block, in_block = (size // num_groups for size in weight.shape)
    weight = weight.coalesce()
    if weight._nnz() != num_groups * out_block * in_block or weight._nnz() == 0:
        return None  # Tensor.to_sparse leaves zeros out
    rows, columns = weight.indices()
    # With this many distinct elements the blocks are complete, and coalescing orders them.
    if not torch.equal(rows // out_block, columns // in_block):
        return None
    return weight.values().view(num_groups, out_block, in_block)


def convert_state_dict(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a checkpoint of another implementation, or of another version of the library, to the form of `model`.

    Args:
        model: a model with packed layers of the installed version.
        state_dict: the state of such a model, of any implementation, saved by version 0.1 or later.

    Returns:
        The state for ``model.load_state_dict``. Entries that already fit, or fit nothing, are unchanged.

    Raises:
        ImportError: TorchUncertainty is not installed, or older than 0.5.
        ValueError: a dense weight has elements outside of its blocks.

    Example::

        >>> from torch_uncertainty.layers.packed import PackedLinear
        >>> from blockdiag.integrations import torch_uncertainty
        >>> old = PackedLinear(256, 128, alpha=2, num_estimators=4, implementation="sparse")
        >>> new = PackedLinear(256, 128, alpha=2, num_estimators=4, implementation="einsum")
        >>> state = torch_uncertainty.convert_state_dict(new, old.state_dict())
        >>> new.load_state_dict(state)
        <All keys matched successfully>
    """
    packed = _packed()
    result = dict(state_dict)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, packed.PackedLinear):
            _convert_linear(module, result, prefix)
        elif isinstance(module, packed.PackedMultiheadAttention):
            _convert_attention(module, result, prefix)
    return result


def _converting(original: Callable[..., None], convert: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        convert(self, state_dict, prefix)
        original(self, state_dict, prefix, *args, **kwargs)

    return load


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    if old in state and new not in state:
        state[new] = state.pop(old)


def _convert_linear(module: Any, state: dict[str, Any], prefix: str) -> None:
    for name in ("weight", "bias"):
        _rename(state, f"{prefix}conv1x1.{name}", f"{prefix}{name}")  # until 0.2 the layer held a convolution
    value, target = state.get(f"{prefix}weight"), module.weight
    if not isinstance(value, Tensor) or (value.shape == target.shape and value.layout == target.layout):
        return
    blocks = _as_blocks(value.detach(), module.groups, prefix)
    if blocks is None:
        return  # load_state_dict reports the mismatch
    converted = torch.block_diag(*blocks).to_sparse() if target.layout == torch.sparse_coo else blocks
    if converted.shape == target.shape:
        state[f"{prefix}weight"] = converted


def _convert_attention(module: Any, state: dict[str, Any], prefix: str) -> None:
    for name in ("weight", "bias"):
        _rename(state, f"{prefix}out_proj.{name}", f"{prefix}out_proj_{name}")  # in 0.4 a separate layer
    key = f"{prefix}out_proj_weight"
    value, target = state.get(key), module.out_proj_weight
    if isinstance(value, Tensor) and value.dim() == 3 and value.shape != target.shape and target.shape[0] == 1:
        dense = torch.block_diag(*value.detach()).unsqueeze(0)  # in 0.4 in blocks even if the layer was the first
        if dense.shape == target.shape:
            state[key] = dense


def _as_blocks(weight: Tensor, groups: int, prefix: str) -> Tensor | None:
    """The blocks of a weight in any form that some version stored; None for other forms."""
    if weight.dim() == 3:  # (out_features, in_block, 1) until 0.4, of a convolution
        if weight.shape[0] == groups:
            return weight
        return (
            weight.squeeze(-1).unflatten(0, (groups, -1))
            if weight.shape[2] == 1 and not weight.shape[0] % groups
            else None
        )
    if weight.dim() != 2 or any(size % groups for size in weight.shape):
        return None
    dense = weight.to_dense() if weight.layout != torch.strided else weight
    blocks = dense.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    if not dense.is_meta and not torch.equal(torch.block_diag(*blocks), dense):
        raise ValueError(
            f"'{prefix}weight' has elements outside of its {groups} blocks: no packed linear layer's weight"
        )
    return blocks.contiguous()
