"""Configs of compress: values, budgets, and several in one call."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from blockdiag import (
    BlockDiagLinear,
    BlockDiagonal,
    LowRank,
    LowRankConv,
    LowRankLinear,
    Monarch,
    MonarchLinear,
    compress,
)
from models import mlp


@pytest.mark.parametrize(
    ("kind", "values", "error", "message"),
    [
        (BlockDiagonal, {"num_blocks": 2.0}, TypeError, "BlockDiagonal: expected num_blocks to be an int, but got 2.0"),
        (BlockDiagonal, {"num_blocks": True}, TypeError, "expected num_blocks to be an int, but got True"),
        (BlockDiagonal, {"num_blocks": "2"}, TypeError, "expected num_blocks to be an int, but got '2'"),
        (BlockDiagonal, {"num_blocks": 0}, ValueError, "expected num_blocks to be at least 1, but got 0"),
        (BlockDiagonal, {"permute": 1}, TypeError, "expected permute to be a bool, but got 1"),
        (BlockDiagonal, {"min_features": -1}, ValueError, "expected min_features to be at least 0, but got -1"),
        (BlockDiagonal, {"min_features": 1.5}, TypeError, "expected min_features to be an int, but got 1.5"),
        (LowRank, {"rank": 0}, ValueError, "LowRank: expected rank to be a positive integer or a fraction"),
        (LowRank, {"rank": 2.5}, ValueError, "a positive integer or a fraction below 1, but got 2.5"),
        (LowRank, {"rank": -0.5}, ValueError, "a positive integer or a fraction below 1, but got -0.5"),
        (LowRank, {"rank": float("nan")}, ValueError, "a positive integer or a fraction below 1, but got nan"),
        (LowRank, {"rank": float("inf")}, ValueError, "a positive integer or a fraction below 1, but got inf"),
        (LowRank, {"rank": True}, TypeError, "expected LowRank's rank to be a number, but got True"),
        (LowRank, {"rank": "4"}, TypeError, "expected LowRank's rank to be a number, but got '4'"),
        (LowRank, {"max_error": 1.5}, ValueError, "LowRank: expected max_error to be between 0 and 1, but got 1.5"),
        (LowRank, {"max_error": [1]}, TypeError, r"expected LowRank's max_error to be a number, but got \[1\]"),
        (LowRank, {"rank": 2, "max_error": 0.5}, ValueError, "LowRank: expected either rank or max_error"),
        (Monarch, {"rank": 0}, ValueError, "Monarch: expected rank to be a positive integer or a fraction below 1"),
        (Monarch, {"rank": 2, "max_error": 0.5}, ValueError, "Monarch: expected either rank or max_error"),
        (Monarch, {"num_blocks": (2, 2, 2)}, ValueError, r"num_blocks to be one number or two, but got \(2, 2, 2\)"),
        (Monarch, {"num_blocks": (2, 0)}, ValueError, "Monarch: expected num_blocks to be at least 1, but got 0"),
        (Monarch, {"num_blocks": (2, 2.0)}, TypeError, "Monarch: expected num_blocks to be an int, but got 2.0"),
        (Monarch, {"num_blocks": True}, TypeError, "expected num_blocks to be an int, but got True"),
    ],
)  # fmt: skip
def test_values(kind, values, error, message):
    with pytest.raises(error, match=message):
        kind(**values)


def test_configs_are_values():
    """Frozen, hashable, and equal for equal numbers of different types."""
    config = LowRank(rank=8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 4
    for equal, other in (
        (LowRank(rank=np.float64(8)), LowRank(rank=7)),
        (LowRank(rank=np.int32(8)), LowRank(rank=0.8)),
        (LowRank(rank=torch.tensor(8)), LowRank()),
        (LowRank(8, None, 256), Monarch(rank=8)),
    ):
        assert equal == config != other
        assert {config: 1} == {equal: 1}
    assert type(LowRank(rank=8.0).rank) is int
    assert Monarch(num_blocks=[2, np.int64(4)]) == Monarch(num_blocks=(2, 4))
    assert hash(Monarch(num_blocks=[2, 4])) == hash(Monarch((2, 4)))
    assert BlockDiagonal(torch.tensor(4)) == BlockDiagonal(num_blocks=4)
    assert dataclasses.replace(BlockDiagonal(4), permute=True) == BlockDiagonal(4, permute=True)
    assert repr(LowRank(rank=8)) == "LowRank(rank=8, max_error=None, min_features=256)"


@pytest.mark.parametrize(
    ("config", "budget", "error", "message"),
    [
        (BlockDiagonal(2), 0.5, ValueError, "BlockDiagonal: expected either num_blocks or budget, but got both"),
        (BlockDiagonal(), None, ValueError, "BlockDiagonal: expected either num_blocks or budget, but got neither"),
        (LowRank(rank=2), 0.5, ValueError, "LowRank: expected one of rank, max_error and budget"),
        (LowRank(max_error=0.5), 0.5, ValueError, "LowRank: expected one of rank, max_error and budget"),
        (Monarch(rank=2), 0.5, ValueError, "Monarch: expected one of rank, max_error and budget, but got several"),
        ({"0": LowRank(), "2": Monarch(rank=2)}, 0.5, ValueError, "Monarch: expected one of rank, max_error and"),
        ({"0": LowRank(), "2": BlockDiagonal(2)}, 0.5, ValueError, "BlockDiagonal: expected either num_blocks or"),
        (LowRank(), 1, ValueError, "LowRank: expected budget to be below 1, but got 1"),
        (LowRank(), 0, ValueError, "expected budget to be a fraction above 0, up to 1, but got 0"),
        (BlockDiagonal(), 1.5, ValueError, "expected budget to be a fraction above 0, up to 1, but got 1.5"),
        (BlockDiagonal(), "half", TypeError, "expected budget to be a number, but got 'half'"),
        (BlockDiagonal(), True, TypeError, "expected budget to be a number, but got True"),
    ],
)  # fmt: skip
def test_budgets_that_do_not_fit(config, budget, error, message):
    """They are rejected before any work: the model is not read."""

    class Untouchable(nn.Module):
        def modules(self):
            raise AssertionError

        named_modules = parameters = modules

    with pytest.raises(error, match=message):
        compress(Untouchable(), config, budget=budget)


def test_a_budget_of_all_parameters():
    new, _ = compress(mlp(24, 36), BlockDiagonal(), budget=1, progress=False)
    assert new[0].num_blocks == 1


@pytest.mark.parametrize(
    ("config", "layer", "rank"),
    [
        (LowRank(min_features=0), nn.Linear(64, 48), 12),
        (LowRank(rank=0.5, min_features=0), nn.Linear(64, 32), 16),
        (LowRank(rank=0.001, min_features=0), nn.Linear(64, 32), 1),
        (LowRank(rank=7, min_features=0), nn.Linear(64, 32), 7),
        (LowRank(rank=0.5, min_features=0), nn.Conv2d(16, 32, 3, groups=2), 4),
        (Monarch(min_features=0), nn.Linear(64, 64), 1),
        (Monarch(num_blocks=2, rank=0.25, min_features=0), nn.Linear(64, 32), 4),
        (Monarch(num_blocks=2, rank=7, min_features=0), nn.Linear(64, 32), 7),
    ],
)  # fmt: skip
def test_ranks(config, layer, rank):
    """Numbers, and fractions of the smaller side of the layer, of each group, or of each submatrix."""
    new, _ = compress(nn.Sequential(layer), config, progress=False)
    assert new[0].rank == rank


def test_several_configs_in_one_call():
    """With one calibration, each layer converts as it does alone."""
    model, x = mlp(24, 24, 24, 24), torch.randn(200, 24, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.named_parameters())
    configs = {
        "0": BlockDiagonal(4, permute=True),
        "2": LowRank(rank=4, min_features=0),
        "4": Monarch(4, max_error=0.9, min_features=0),
    }
    batches, seen = [x[:100], x[100:]], []

    def calibration(model):
        for batch in batches:
            seen.append(model(batch))

    alone = [
        compress(model, {name: config}, calibration=batches, progress=False)[0][int(name)]
        for name, config in configs.items()
    ]
    compress(model, configs, calibration=calibration, optimizers=optimizer, inplace=True, progress=False)
    assert len(seen) == 2
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    kinds = [type(layer) for layer in model[::2]]
    assert issubclass(kinds[0], BlockDiagLinear) or hasattr(model[0], "input_permutation")
    assert kinds[1:] == [LowRankLinear, MonarchLinear]
    for together, single in zip(model[2::2], alone[1:], strict=True):
        torch.testing.assert_close(together.state_dict(), single.state_dict(), rtol=0, atol=0)
    hidden = model[0](x).sort(-1).values  # only the order may differ, if a neighbor took over a permutation
    torch.testing.assert_close(hidden, alone[0](x).sort(-1).values)


def test_one_budget_for_low_rank_and_monarch_layers():
    """It limits the operations of all these layers together; a budget for blocks limits each layer's parameters."""
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)], nn.Conv1d(64, 64, 3))
    model[0].weight.data = torch.randn(64, 2) @ torch.randn(2, 64)  # of rank 2
    low_rank = LowRank(min_features=0)
    new, report = compress(
        model, {"0": low_rank, "1": Monarch(2, min_features=0), "2": BlockDiagonal(), "3": low_rank}, budget=0.4,
        progress=False,
    )  # fmt: skip
    assert [type(layer) for layer in new] == [LowRankLinear, MonarchLinear, BlockDiagLinear, LowRankConv]
    assert new[2].num_blocks == 4
    ranked = [layer for layer in report.layers if layer.name != "2"]
    before, after = (sum(getattr(layer, cost).operations for layer in ranked) for cost in ("cost_before", "cost_after"))
    assert 0.35 * before < after <= 0.4 * before
    assert new[0].rank == 2
    assert new[1].rank > 2


def test_warnings_name_the_line_of_the_user():
    model = mlp(8, 8, 8)
    model[1].register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = [torch.randn(5, 8, dtype=torch.float64)]
        compress(model, BlockDiagonal(2, min_features=9), dry_run=True, progress=False)
        compress(model, BlockDiagonal(2), calibration=x, progress=False)
        compress(mlp(8, 8, 8), BlockDiagonal(2, permute=True), "0", inplace=True, progress=False)
    messages = (
        "nothing was compressed",
        "calibration does not call",
        "'0' has 8",
        "'2' has 8",
        "['2.weight'] took over",
    )
    assert [str(warning.message)[: len(m)] for warning, m in zip(caught, messages, strict=True)] == list(messages)
    assert all(warning.filename == __file__ for warning in caught)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": [nn.Linear(2, 2)]}, TypeError, r"expected model to be a torch.nn.Module, but got \[Linear"),
        ({"model": nn.Linear}, TypeError, "expected model to be a torch.nn.Module, but got <class"),
        ({"optimizers": None}, TypeError, "expected optimizers to be torch.optim.Optimizer, but got NoneType"),
        ({"calibration": 4}, TypeError, "expected calibration to be an iterable of batches or a function, but got 4"),
        ({"measure": True}, TypeError, "expected measure to be an int, but got True"),
        ({"measure": 2.5}, TypeError, "expected measure to be an int, but got 2.5"),
        ({"measure": -1}, ValueError, "expected measure to be at least 0, but got -1"),
    ],
)
def test_arguments_that_do_not_fit(settings, error, message):
    with pytest.raises(error, match=message):
        compress(**{"model": mlp(8, 8, 8), "config": BlockDiagonal(2), "progress": False, **settings})
