"""Layers with separate parameters for each of several stacked models, on inputs ``(*, num_models, features)``."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockdiag._surgery.plain import carry_attributes
from blockdiag.functional import linear
from blockdiag.nn.block_diag_linear import BlockDiagLinear


def _stack(modules: Sequence[Any], name: str) -> nn.Parameter | None:
    parameters = [getattr(module, name) for module in modules]
    if parameters[0] is None:
        return None
    stacked = nn.Parameter(torch.stack([p.detach() for p in parameters]), requires_grad=parameters[0].requires_grad)
    carry_attributes(parameters[0], stacked)
    return stacked


class _StackedAffine(nn.Module):
    """Layers with an elementwise weight, and optionally a bias, of shape (num_models, features)."""

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__()
        self.weight = _stack(modules, "weight")
        self.bias = _stack(modules, "bias") if hasattr(modules[0], "bias") else None

    def _affine(self, normalized: Tensor) -> Tensor:
        output = normalized if self.weight is None else normalized * self.weight
        return output if self.bias is None else output + self.bias

    def restore(self, module: nn.Module, index: int) -> nn.Module:
        """Copies the parameters of one model into a layer of its kind."""
        for name in ("weight", "bias"):
            if getattr(self, name) is not None:
                stacked = getattr(self, name)
                parameter = nn.Parameter(stacked[index].detach().clone(), requires_grad=stacked.requires_grad)
                carry_attributes(stacked, parameter)
                module.register_parameter(name, parameter)
        return module


class StackedLayerNorm(_StackedAffine):
    """:class:`torch.nn.LayerNorm` over the features."""

    __constants__: ClassVar[list[str]] = ["eps", "normalized_shape"]

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__(modules)
        self.normalized_shape, self.eps = modules[0].normalized_shape, modules[0].eps

    def forward(self, input: Tensor) -> Tensor:
        return self._affine(F.layer_norm(input, self.normalized_shape, eps=self.eps))


class StackedRMSNorm(_StackedAffine):
    """:class:`torch.nn.RMSNorm` over the features."""

    __constants__: ClassVar[list[str]] = ["eps", "normalized_shape"]

    def __init__(self, modules: Sequence[Any]) -> None:
        super().__init__(modules)
        self.normalized_shape, self.eps = modules[0].normalized_shape, modules[0].eps

    def forward(self, input: Tensor) -> Tensor:
        return self._affine(F.rms_norm(input, self.normalized_shape, eps=self.eps))


class StackedPReLU(_StackedAffine):
    """:class:`torch.nn.PReLU` with one slope or one per feature."""

    def forward(self, input: Tensor) -> Tensor:
        assert self.weight is not None
        return torch.where(input >= 0, input, self.weight * input)


class StackedBatchNorm1d(nn.Module):
    """:class:`torch.nn.BatchNorm1d` on inputs ``(batch, num_models, features)``, run as one layer over all features."""

    def __init__(self, modules: Sequence[nn.BatchNorm1d]) -> None:
        super().__init__()
        self.batches_ahead: Tensor
        first = modules[0]
        self.num_models = len(modules)
        counts: list[Any] = [module.num_batches_tracked for module in modules]
        if counts[0] is not None:
            ahead = torch.stack([count - counts[0] for count in counts])
            if first.momentum is None and ahead.any():
                raise ValueError(
                    "StackedBatchNorm1d: expected models with momentum=None to have seen equally many batches, but got "
                    f"{[int(count) for count in counts]}"
                )
            self.register_buffer("batches_ahead", ahead)  # of self.norm's count
        tensor = [*first.parameters(), *first.buffers(), torch.empty(0)][0]
        self.norm = nn.BatchNorm1d(
            self.num_models * first.num_features,
            first.eps,
            first.momentum,
            first.affine,
            first.track_running_stats,
            device=tensor.device,
            dtype=tensor.dtype if tensor.is_floating_point() else None,
        )
        states: list[Any] = [dict((*module.named_parameters(), *module.named_buffers())) for module in modules]
        for name, tensor in self.norm.state_dict(keep_vars=True).items():
            parts = [state[name] for state in states]
            with torch.no_grad():
                tensor.copy_(torch.cat(parts) if parts[0].dim() else parts[0])
        for name, parameter in first.named_parameters():
            carry_attributes(parameter, getattr(self.norm, name).requires_grad_(parameter.requires_grad))

    def forward(self, input: Tensor) -> Tensor:
        # A torch.fx proxy is not a Tensor and has no sizes to compare.
        if not torch.jit.is_scripting() and isinstance(input, Tensor) and input.dim() != 3:
            raise ValueError(
                "StackedBatchNorm1d: expected an input (batch, num_models, features), but got the shape "
                f"{tuple(input.shape)}"
            )
        return self.norm(input.flatten(-2)).unflatten(-1, [self.num_models, input.shape[-1]])

    def restore(self, module: nn.Module, index: int) -> nn.Module:
        """Copies the parameters and statistics of one model into a layer of its kind."""
        state = {
            name: tensor.chunk(self.num_models)[index] if tensor.dim() else tensor + self.batches_ahead[index]
            for name, tensor in self.norm.state_dict().items()
        }
        module.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
        for name, parameter in self.norm.named_parameters():
            carry_attributes(parameter, getattr(module, name).requires_grad_(parameter.requires_grad))
        return module


class StackedLinear(BlockDiagLinear):
    """:class:`torch.nn.Linear` with one block per model."""

    def forward(self, input: Tensor) -> Tensor:
        if self.in_features > 0:
            return linear(input, self.weight, self.bias)
        # Concatenated: a stacked input (*, num_models, 0) looks like a concatenated one, (*, in_features).
        output = linear(input.flatten(-2), self.weight, self.bias)
        return output.unflatten(-1, [self.num_blocks, self.out_features // self.num_blocks])

    def restore(self, module: nn.Module, index: int) -> nn.Module:
        """Copies the parameters of one model into a layer of its kind."""
        for name, parameter in self.to_linears()[index].named_parameters():
            module.register_parameter(name, parameter)
        return module
