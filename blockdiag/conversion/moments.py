"""What calibration inputs tell about a layer: the first two moments of its inputs, summed over all of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from blockdiag.conversion.progress import track

# Batches for the model, or a function that runs the model on its inputs. A batch is a tensor, a tuple or list of
# positional arguments, or a mapping of keyword arguments.
Calibration = Iterable[Any] | Callable[[nn.Module], object]


class Moments(NamedTuple):
    """Of all rows ``x`` of a layer's inputs, by group of a convolution (a linear layer is one group), in double."""

    num_rows: int
    total: Tensor  # sum of x, (groups, K)
    outer: Tensor  # sum of x x^H, (groups, K, K)

    @property
    def mean(self) -> Tensor:
        return self.total / self.num_rows

    def second(self, centered: bool) -> Tensor:
        """E[x x^H], or with `centered` the covariance: what is left to minimise where a bias takes care of the mean."""
        second = self.outer / self.num_rows
        return second - self.mean.unsqueeze(-1) * self.mean.conj().unsqueeze(-2) if centered else second


def add_moments(moments: Sequence[Moments]) -> Moments:
    """Those of all their rows together."""
    num_rows, totals, outers = zip(*moments, strict=True)
    return Moments(sum(num_rows), sum(totals), sum(outers))


@contextmanager
def all_or_none(group: Any, device: torch.device) -> Iterator[None]:
    """Raises in every process of the group if one of them does, so that none waits for it."""
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


def no_moments(layer: Any) -> Moments:
    """Those of a layer that has seen nothing yet."""
    weight = exact(layer.weight)
    groups = getattr(layer, "groups", 1)
    features = weight[0].numel()
    return Moments(0, weight.new_zeros(groups, features), weight.new_zeros(groups, features, features))


def sum_over_processes(moments: Moments, group: Any) -> Moments:
    """Those of all processes of the group together; each has to call it."""
    num_rows = torch.tensor(moments.num_rows, device=moments.total.device)
    for tensor in (num_rows, moments.total, moments.outer):
        distributed.all_reduce(tensor, group=group)
    return Moments(int(num_rows), moments.total, moments.outer)


def exact(tensor: Tensor) -> Tensor:
    """In double precision: projections are made once, and their errors should be the method's."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))


def _patches(conv: Any, input: Tensor) -> Tensor:
    """What a convolution multiplies its weight with: (groups, positions, in_channels / groups * kernel elements)."""
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    patches = F.pad(input, conv._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        patches = patches.unfold(2 + dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    spatial = len(conv.kernel_size)
    patches = patches.unflatten(1, (conv.groups, -1)).movedim(1, 0)  # (groups, batch, channels, *positions, *kernel)
    return patches.movedim(2, 2 + spatial).flatten(2 + spatial).flatten(1, -2)


def _rows(layer: Any, input: Tensor) -> Iterator[Tensor]:
    """The rows (groups, rows, K) that the layer multiplies its weight with, in portions of bounded memory."""
    if hasattr(layer, "in_features"):
        yield from input.reshape(1, -1, layer.in_features).split(65536, dim=1)
        return
    conv = getattr(layer, "down", layer)  # of a LowRankConv the first one, which has its kernel
    unbatched = input.dim() == len(conv.kernel_size) + 1
    for sample in [input[None]] if unbatched else input.split(1):
        yield _patches(conv, sample)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        # Eager: code that was compiled before knows nothing of the hooks that look on.
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _run(model: nn.Module, calibration: Calibration, progress: bool) -> None:
    if isinstance(calibration, Tensor):
        raise TypeError("expected calibration to be an iterable of batches, but got a Tensor: put it in a list")
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


def collect_moments(
    model: nn.Module, layers: Mapping[str, nn.Module], calibration: Calibration, progress: bool
) -> tuple[dict[nn.Module, Moments], dict[nn.Module, Sequence[int]]]:
    """Runs the model on the calibration inputs: each layer's moments, and the shape of the first input that it saw.

    The model is as it was afterwards, whatever happens. Layers that are never called are missing from the results.

    Raises:
        ValueError: there are no batches, the model fails on one, or a layer sees NaN or infinity.
    """
    moments: dict[nn.Module, Moments] = {}
    shapes: dict[nn.Module, Sequence[int]] = {}

    def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = args[0] if args else kwargs["input"]
        shapes.setdefault(layer, input.shape)
        for rows in _rows(layer, input):
            rows = exact(rows)
            new = Moments(rows.shape[1], rows.sum(1), rows.mT @ rows.conj())
            moments[layer] = add_moments([moments[layer], new]) if layer in moments else new

    handles = []
    try:
        for layer in set(layers.values()):
            handles.append(layer.register_forward_pre_hook(observe, with_kwargs=True))
        with _evaluating(model):
            _run(model, calibration, progress)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in layers.items():
        if layer in moments and not moments[layer].outer.isfinite().all():
            raise ValueError(f"calibration inputs of '{name}' have NaN or infinite values")
    return {layer: m for layer, m in moments.items() if m.num_rows > 0}, shapes
