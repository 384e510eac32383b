"""Every public module: exported by the package, or returned by its conversions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import blockdiag
from blockdiag.compression.attention import SplitAttention

_INPUT_ORDER = [3, 0, 2, 1, 5, 4, 11, 10, 9, 8, 7, 6]
_OUTPUT_ORDER = [7, 5, 6, 4, 3, 1, 2, 0]


class Case(NamedTuple):
    make: Callable[..., nn.Module]  # takes device and dtype
    inputs: Callable[[int], tuple[Tensor, ...]]  # of a batch size
    takes_jagged: bool = True
    traceable: bool = True  # by torch.fx and torch.jit.script


def _stacked(**options: Any) -> nn.Module:
    def model() -> nn.Module:
        layers = [nn.Linear(12, 6), nn.LayerNorm(6), nn.PReLU(), nn.BatchNorm1d(6), nn.RMSNorm(6), nn.GELU()]
        return nn.Sequential(nn.Flatten(), *layers, nn.Dropout(0.0), nn.Linear(6, 8)).to(**options)

    return blockdiag.stack_models([model() for _ in range(3)])


def _compressed(**options: Any) -> nn.Module:
    """A compressed model, to trace, script and export as a whole."""
    with torch.device("cpu"):  # a model on the meta device cannot be converted
        model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        low_rank, monarch = blockdiag.LowRank(rank=2, min_features=1), blockdiag.Monarch(min_features=1)
        configs = {"0": blockdiag.BlockDiagonal(2), "2": low_rank, "4": monarch}
        model, _ = blockdiag.compress(model, configs, progress=False)
    return model.to(**{"device": torch.get_default_device(), **options})


def _linear(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 12),)


def _conv(dims: int, **settings: Any) -> Case:
    return Case(
        lambda **options: blockdiag.LowRankConv(4, 6, (3,) * dims, 2, **settings, **options),
        lambda batch: (torch.randn(batch, 4, *[5] * dims),),
        takes_jagged=False,
    )


def _recurrent(kind: type[nn.Module]) -> Case:
    return Case(
        lambda **options: kind(12, 8, batch_first=True, block_size=(4, 2), density=0.4, **options),
        lambda batch: (torch.randn(batch, 5, 12),),
        takes_jagged=False,
        traceable=False,
    )


CASES = {
    "BlockDiagLinear": Case(lambda **options: blockdiag.BlockDiagLinear(12, 8, 4, **options), _linear),
    "BlockDiagLinear, without bias": Case(
        lambda **options: blockdiag.BlockDiagLinear(12, 8, 4, bias=False, **options), _linear
    ),
    "PermutedBlockDiagLinear": Case(
        lambda **options: blockdiag.PermutedBlockDiagLinear(12, 8, 4, _INPUT_ORDER, _OUTPUT_ORDER, **options), _linear
    ),
    "PermutedBlockDiagLinear, input": Case(
        lambda **options: blockdiag.PermutedBlockDiagLinear(12, 8, 4, _INPUT_ORDER, bias=False, **options), _linear
    ),
    "PermutedBlockDiagLinear, neither": Case(
        lambda **options: blockdiag.PermutedBlockDiagLinear(12, 8, 4, **options), _linear
    ),
    "BlockSparseLinear": Case(lambda **options: blockdiag.BlockSparseLinear(12, 8, (2, 3), 0.4, **options), _linear),
    "BlockSparseLinear, diagonal": Case(
        lambda **options: nn.Sequential(
            blockdiag.BlockSparseLinear(12, 12, (4, 1), 0.2, diagonal=True, **options),
            blockdiag.BlockSparseLinear(12, 8, (8, 4), 0.0, bias=False, **options),
        ),
        _linear,
    ),
    "BlockSparseGRU": _recurrent(blockdiag.BlockSparseGRU),
    "BlockSparseLSTM": _recurrent(blockdiag.BlockSparseLSTM),
    "LowRankLinear": Case(lambda **options: blockdiag.LowRankLinear(12, 8, 3, **options), _linear),
    "MonarchLinear": Case(lambda **options: blockdiag.MonarchLinear(12, 8, (3, 4), 2, **options), _linear),
    "LowRankConv, 1d": _conv(1, padding=1, padding_mode="circular"),
    "LowRankConv, 2d": _conv(2, groups=2, bias=False),
    "LowRankConv, 3d": _conv(3, stride=2),
    "StackedModel": Case(_stacked, lambda batch: (torch.randn(batch, 3, 4),), takes_jagged=False),
    "SplitAttention": Case(
        lambda **options: SplitAttention(nn.MultiheadAttention(12, 3, batch_first=True, add_bias_kv=True, **options)),
        lambda batch: tuple(torch.randn(batch, 5, 12) for _ in range(3)),
        takes_jagged=False,
    ),
    "a compressed model": Case(_compressed, _linear),
}


def initialized(case: Case, **options: Any) -> nn.Module:
    """A module in eval mode with all values defined: SplitAttention starts uninitialized."""
    module = case.make(**options).eval()
    for parameter in module.parameters():
        if not parameter.is_meta:
            nn.init.normal_(parameter, std=0.3)
    return module


def first(output: Any) -> Tensor:
    """The output; of attention and recurrent layers, the first of two."""
    return output[0] if isinstance(output, tuple) else output
