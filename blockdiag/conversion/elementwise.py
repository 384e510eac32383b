"""Modules and functions that treat every element by itself, whatever the shape."""

import torch
from torch import nn
from torch.nn import functional as F

_MODULES = (
    nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

# As torch.fx records them: functions, and names of tensor methods.
ELEMENTWISE_FUNCTIONS = {
    F.celu, F.dropout, F.elu, F.gelu, F.hardshrink, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid,
    F.mish, F.relu, F.relu6, F.selu, F.sigmoid, F.silu, F.softplus, F.softshrink, F.softsign, F.tanh, F.tanhshrink,
    torch.relu, torch.sigmoid, torch.square, torch.tanh, "relu", "sigmoid", "square", "tanh",
}  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks on, or changes what goes in or comes out."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def is_elementwise(module: nn.Module) -> bool:
    """Whether it is such a module, without hooks."""
    return type(module) in _MODULES and not has_hooks(module)
