"""Private code that several layers share."""

import warnings
from typing import Any

from torch import Tensor, nn

from blockdiag._surgery.plain import why_not_plain


class Unquantized(nn.Module):
    """A layer that ``torch.ao.quantization`` has no quantized form of, and that says so when it is left as it is."""

    _quantize_as = "to_dense()"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "qconfig":  # set by torch.ao.quantization on every module, whether it can quantize that or not
            warnings.warn(
                f"torch.ao.quantization has no quantized form of {type(self).__name__}, and leaves it as it is, unless "
                f"you give it a mapping with one. To quantize it, convert it by {self._quantize_as} before",
                stacklevel=2,
            )
        super().__setattr__(name, value)


class LowRank(nn.Module):
    """Two layers in a row: ``down`` to few features, and ``up`` from them."""

    down: Any
    up: Any

    @property
    def bias(self) -> Tensor | None:
        """The bias of ``up``."""
        return self.up.bias

    def reset_parameters(self) -> None:
        """Draws the parameters of both layers anew, each from its own layer's distribution."""
        self.down.reset_parameters()
        self.up.reset_parameters()

    def forward(self, input: Tensor) -> Tensor:
        return self.up(self.down(input))


def check_own_forward(layer: nn.Module) -> None:
    """Raises if one of our layers computes something else than its class defines."""
    kind = next(base for base in type(layer).__mro__ if base.__module__.startswith("blockdiag."))
    reason = why_not_plain(layer, kind)
    if reason is not None:
        raise ValueError(f"{kind.__name__}: {reason}")
