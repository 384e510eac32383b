"""Runs a copy of the model on calibration inputs, and sums the moments of its layers' inputs."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from blockdiag._surgery.duplicate import (
    computes_weight,
    duplicate,
    random_state_kept,
    route_calls,
    run_forward,
    uncompiled,
)
from blockdiag.compression.checks import CONVOLUTIONS
from blockdiag.compression.numerics.moments import Moments, add_moments, exact, moments_of
from blockdiag.compression.progress import track

# Batches for the model, or a function that runs the model on its inputs. A batch is a tensor, a tuple or list of
# positional arguments, or a mapping of keyword arguments.
Calibration = Iterable[Any] | Callable[[nn.Module], object]


def collect(
    model: nn.Module,
    wrapper: nn.Module,
    layers: Mapping[str, nn.Module],
    read: Set[nn.Module],
    calibration: Calibration,
    progress: bool,
) -> tuple[dict[str, Moments], dict[str, tuple[int, ...]]]:
    """Moments and shapes of the inputs of these layers by name; under DistributedDataParallel of all processes.

    Raises:
        ValueError: the model fails, or a layer sees NaN or infinity; or is never called, unless its weight is `read`.
    """
    group = wrapper.process_group if isinstance(wrapper, nn.parallel.DistributedDataParallel) else None
    with _all_or_none(group, next(model.parameters()).device):
        moments, shapes = _collect_moments(model, list(layers), calibration, progress)
    if group is not None:  # each process saw inputs of its own, or none
        for name, layer in layers.items():
            moments[name] = _sum_over_processes(moments.get(name, _no_moments(layer)), group)
        moments = {name: m for name, m in moments.items() if m.num_rows > 0}
    for name, layer in layers.items():
        if name not in moments and layer not in read:
            raise ValueError(f"the calibration inputs never reached '{name}': leave it out, or give inputs that do")
        if name in moments and moments[name].num_rows < moments[name].total.shape[-1]:
            warnings.warn(
                f"'{name}' has {moments[name].total.shape[-1]} inputs, but was calibrated on only "
                f"{moments[name].num_rows} rows: it will fit these better than others",
                stacklevel=3,
            )
    return moments, {name: tuple(shape) for name, shape in shapes.items()}


def _collect_moments(
    model: nn.Module, names: Sequence[str], calibration: Calibration, progress: bool
) -> tuple[dict[str, Moments], dict[str, Sequence[int]]]:
    """Runs a copy of the model on the calibration inputs: each layer's moments, and the shape of its first input.

    Layers that are never called are missing from the results.

    Raises:
        ValueError: the model cannot be copied, there are no batches, it fails on one, or a layer sees NaN or infinity.
    """
    moments: dict[str, Moments] = {}
    shapes: dict[str, Sequence[int]] = {}
    copied = _copy_to_run(model)
    layers = {copied.get_submodule(name): name for name in names}

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        name = layers.get(module)
        if name is not None:
            input = args[0] if args else kwargs["input"]
            shapes.setdefault(name, input.shape)
            for rows in _rows(module, input.detach()):
                new = moments_of(rows)
                moments[name] = add_moments([moments[name], new]) if name in moments else new
        return run_forward(module, *args, **kwargs)

    route_calls(copied, call)
    with random_state_kept(), uncompiled(), torch.no_grad():
        _run(copied, calibration, progress)
    for name in names:
        if name in moments and not moments[name].outer.isfinite().all():
            raise ValueError(f"calibration inputs of '{name}' have NaN or infinite values")
    return {name: m for name, m in moments.items() if m.num_rows > 0}, shapes


def _patches(conv: Any, input: Tensor) -> Tensor:
    """The rows that a convolution multiplies its weight with: (groups, positions, in_channels / groups * kernel)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    patches = F.pad(input, conv._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        patches = patches.unfold(2 + dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    spatial = len(conv.kernel_size)
    patches = patches.unflatten(1, (conv.groups, -1)).movedim(1, 0)  # (groups, batch, channels, *positions, *kernel)
    return patches.movedim(2, 2 + spatial).flatten(2 + spatial).flatten(1, -2)


def _rows(layer: Any, input: Tensor) -> Iterator[Tensor]:
    """The rows (groups, rows, K) that the layer multiplies its weight with, in chunks of bounded memory."""
    if hasattr(layer, "in_features"):
        yield from input.reshape(1, -1, layer.in_features).split(65536, dim=1)
        return
    # Of a factorized convolution the part that has its kernel; of pointwise ones the first.
    parts = [part for part in layer.modules() if isinstance(part, CONVOLUTIONS)]
    conv = max(parts, key=lambda part: math.prod(part.kernel_size))
    unbatched = input.dim() == len(conv.kernel_size) + 1
    for sample in [input[None]] if unbatched else input.split(1):
        yield _patches(conv, sample)


def _run(model: nn.Module, calibration: Calibration, progress: bool) -> None:
    """Runs the model on all batches, or the function on the model."""
    if isinstance(calibration, Tensor):
        raise TypeError("expected calibration to be an iterable of batches, but got a Tensor: put it in a list")
    # A map-style torch.utils.data.Dataset is iterated by its items.
    if not (callable(calibration) or isinstance(calibration, Iterable) or hasattr(calibration, "__getitem__")):
        raise TypeError(f"expected calibration to be an iterable of batches or a function, but got {calibration!r}")
    if callable(calibration) and not isinstance(calibration, Iterable):
        calibration(model)
        return
    count = 0
    for count, batch in enumerate(track(calibration, "calibrating", progress), 1):
        try:
            if isinstance(batch, Mapping):
                model(**batch)
            elif isinstance(batch, tuple | list):
                model(*batch)
            else:
                model(batch)
        except Exception as error:
            raise ValueError(
                f"the model failed on calibration batch {count - 1} (a tuple or list is taken as its positional "
                f"arguments, a mapping as keyword arguments): {error}"
            ) from error
    if count == 0:
        raise ValueError("expected calibration to give at least one batch, but got none")


def _copy_to_run(model: nn.Module) -> Any:
    """A copy in eval mode and without hooks."""
    for name, module in model.named_modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if any(not computes_weight(hook) for hook in hooks):
            warnings.warn(f"calibration does not call the forward hooks of '{name}' and others", stacklevel=5)
            break
    try:
        return duplicate(model, hooks=False).eval()
    except Exception as error:
        raise ValueError(f"calibration runs a copy of the model, which cannot be copied: {error}") from error


@contextmanager
def _all_or_none(group: Any, device: torch.device) -> Iterator[None]:
    """Raises in every process of the group if it raises in one of them, so that none waits for it."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if group is not None:
        failures = torch.tensor(failure is not None, dtype=torch.int64, device=device)
        distributed.all_reduce(failures, group=group)
        if failure is None and failures > 0:
            raise ValueError(f"calibration failed in {int(failures)} other processes")
    if failure is not None:
        raise failure


def _no_moments(layer: Any) -> Moments:
    """The moments of a layer that has seen nothing yet."""
    weight = exact(layer.weight)
    groups = getattr(layer, "groups", 1)
    features = weight[0].numel()
    return Moments(0, weight.new_zeros(groups, features), weight.new_zeros(groups, features, features))


def _sum_over_processes(moments: Moments, group: Any) -> Moments:
    """The moments of all processes of the group together; each has to call it."""
    num_rows = torch.tensor(moments.num_rows, device=moments.total.device)
    for tensor in (num_rows, moments.total, moments.outer):
        distributed.all_reduce(tensor, group=group)
    return Moments(int(num_rows), moments.total, moments.outer)
