"""Elementwise modules and functions, for any shape."""

import torch
from torch import nn
from torch.nn import functional as F

from blockdiag._surgery.plain import why_not_plain

_MODULES = (
    nn.CELU, nn.Dropout, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip

# As recorded by torch.fx: functions, and names of tensor methods.
ELEMENTWISE_FUNCTIONS = {
    F.celu, F.dropout, F.elu, F.gelu, F.hardshrink, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid,
    F.mish, F.relu, F.relu6, F.selu, F.sigmoid, F.silu, F.softplus, F.softshrink, F.softsign, F.tanh, F.tanhshrink,
    torch.relu, torch.sigmoid, torch.square, torch.tanh, "relu", "sigmoid", "square", "tanh",
}  # fmt: skip


def is_elementwise(module: nn.Module) -> bool:
    """Whether the module is elementwise, without hooks or a replaced forward."""
    return type(module) in _MODULES and why_not_plain(module, type(module)) is None
