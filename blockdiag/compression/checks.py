"""Whether layers can be replaced at all: checked before any work."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from blockdiag._surgery.plain import has_own_forward, why_not_plain
from blockdiag._surgery.sharing import check_sharing
from blockdiag.compression.config import Config
from blockdiag.nn.block_diag_linear import BlockDiagLinear

LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)  # the latter is nn.MultiheadAttention's out_proj
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
IN_ATTENTION = "torch.nn.MultiheadAttention reads its weight, and never calls it: apply blockdiag.split_attention first"


def is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.") and hasattr(module, "in_features")


def check_layer(name: str, layer: Any, values: bool = True) -> None:
    """Raises if the layer's parameters are not plain dense ones that can be read and replaced."""
    if is_quantized(layer):
        raise ValueError(f"'{name}' is quantized: compress the model first, then quantize it")
    if parametrize.is_parametrized(layer):
        raise ValueError(f"'{name}' is parametrized: remove it by torch.nn.utils.parametrize.remove_parametrizations")
    check_parts(name, layer)
    own = dict(layer.named_parameters(recurse=False))
    dense = not isinstance(layer, Config.compressed_kinds())
    if dense and set(own) != ({"weight"} if layer.bias is None else {"weight", "bias"}):
        raise ValueError(
            f"'{name}' has parameters {sorted(own)} in place of weight and bias: remove pruning or weight and spectral "
            "normalization first"
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
                "compress the model before it is sharded or quantized"
            )
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"'{name}.{key}' has hooks of its own, which a parameter of another shape cannot take over"
            )
        with torch.no_grad():  # also of one that was made in inference mode
            finite = not values or bool(parameter.isfinite().all())
        if not finite:
            raise ValueError(f"'{name}.{key}' has NaN or infinite values")


def can_be_reordered(model: nn.Module, layer: nn.Module) -> bool:
    """Whether it is a plain nn.Linear, of any values, whose parameters no other module has.

    And without tensors of another kind, such as a mask, which would stay in the old order.
    """
    if (
        type(layer) is not nn.Linear
        or layer._buffers
        or any(isinstance(value, Tensor) for value in vars(layer).values())
    ):
        return False
    try:
        check_layer("", layer, values=False)
        check_sharing(model, {layer: ""})
    except ValueError:
        return False
    return True


def attention_projections(model: nn.Module) -> set[nn.Module]:
    """The output projections of torch.nn.MultiheadAttention: it reads their weight, and never calls them."""
    return {module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)}
