"""Hugging Face transformers: makes Conv1D layers convertible."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from blockdiag._surgery.optimizers import Successor
from blockdiag._surgery.replacement import Replacement, fill
from blockdiag.compression.exchange import exchange

__all__ = ["conv1d_to_linear"]


def conv1d_to_linear(
    model: nn.Module, *, optimizers: Optimizer | Iterable[Optimizer] = (), inplace: bool = False
) -> nn.Module:
    """Replaces the ``Conv1D`` layers of GPT-2 and similar models by equivalent :class:`torch.nn.Linear` layers.

    Despite its name, ``Conv1D`` is a linear layer with a transposed weight. :func:`blockdiag.compress` can compress it
    once it is an ``nn.Linear``.

    Args:
        model: any module. A :class:`~torch.nn.parallel.DistributedDataParallel` is wrapped again: use the returned one.
        optimizers: optimizers of the model, rebound to the new parameters with all of their state. Needs ``inplace``.
        inplace: whether to change the model itself. Default: a copy.

    Returns:
        The model.

    Raises:
        ValueError: the model has no ``Conv1D``, or one is on the meta device, not finite, or shares its parameters.

    Example::

        >>> from torch import nn
        >>> from transformers.pytorch_utils import Conv1D
        >>> from blockdiag.integrations.transformers import conv1d_to_linear
        >>> conv1d_to_linear(nn.Sequential(Conv1D(3072, 768), nn.GELU(), Conv1D(768, 3072)))
        Sequential(
          (0): Linear(in_features=768, out_features=3072, bias=True)
          (1): GELU(approximate='none')
          (2): Linear(in_features=3072, out_features=768, bias=True)
        )
    """
    return exchange(
        model,
        # By name, as isinstance would need the library.
        lambda module: type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils",
        _as_linear,
        missing="conv1d_to_linear: expected a model with transformers' Conv1D inside",
        optimizers=optimizers,
        inplace=inplace,
    )


def _as_linear(names: list[str], old: Any) -> Replacement:
    in_features, out_features = old.weight.shape
    linear = nn.utils.skip_init(
        nn.Linear, in_features, out_features, device=old.weight.device, dtype=old.weight.dtype
    ).train(old.training)
    successors = {}
    for name, gather in (("weight", Tensor.t), ("bias", Tensor.detach)):
        parameter, successor = getattr(old, name), getattr(linear, name)
        fill(successor, gather(parameter.detach()))
        successor.requires_grad_(parameter.requires_grad)
        successors[parameter] = [Successor(successor, gather)]
    return Replacement(names, old, linear, successors)
