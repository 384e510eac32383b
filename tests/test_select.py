"""Selection of layers: patterns, functions and mappings, and layers that are already compressed."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import blockdiag
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

LOW_RANK = LowRank(rank=2, min_features=0)


@pytest.mark.parametrize(
    "layers",
    [
        "encoder.*",
        re.compile(r"^encoder\.\d"),
        ["encoder.0", re.compile("er.2$")],
        lambda name, layer: layer.out_features == 8,
    ],
    ids=["glob", "regex", "list", "function"],
)
def test_layers(layers):
    model = nn.ModuleDict({"encoder": mlp(8, 8, 8), "head": nn.Linear(8, 4)})
    new, report = compress(model, BlockDiagonal(2), layers, progress=False)
    assert [layer.name for layer in report.layers] == ["encoder.0", "encoder.2"]
    assert [type(m) for m in (new["encoder"][0], new["encoder"][2], new["head"])] == [BlockDiagLinear] * 2 + [nn.Linear]


def test_classes_of_layers():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    new, _ = compress(model, LOW_RANK, nn.Conv2d, progress=False)
    assert [type(m) for m in new][:3] == [nn.Conv1d, LowRankConv, nn.Linear]
    new, _ = compress(model, LOW_RANK, [nn.Conv2d, nn.Conv1d], progress=False)
    assert [type(m) for m in new][:3] == [LowRankConv, LowRankConv, nn.Linear]
    new, _ = compress(model, LOW_RANK, nn.Linear, progress=False)  # its subclasses too
    assert type(new[2]) is type(new[3].out_proj) is LowRankLinear


@pytest.mark.parametrize(
    ("answer", "chosen"),
    [(True, True), (False, False), (None, False), (torch.tensor(True), True), (np.False_, False)],
    ids=repr,
)
def test_what_a_function_may_return(answer, chosen):
    model = mlp(8, 8, 8)
    new, _ = compress(model, BlockDiagonal(2), lambda name, _: answer if name == "0" else True, progress=False)
    assert isinstance(new[0], BlockDiagLinear) == chosen
    for wrong in (2.5, "yes", 2, np.int64(2)):
        with pytest.raises(TypeError, match="expected layers to return a bool for '0', but got"):
            compress(model, BlockDiagonal(2), lambda name, _, wrong=wrong: wrong)


def test_a_mapping_of_patterns_to_configs():
    """The first pattern that matches decides, and None leaves a layer alone."""
    model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(5)], nn.Conv1d(16, 16, 3))
    configs = {
        "0": BlockDiagonal(4),
        re.compile("[01]"): Monarch(min_features=0),
        "2": None,
        nn.Conv1d: LowRank(rank=3, min_features=0),
        "*": LOW_RANK,
    }
    new, report = compress(model, configs, progress=False)
    kinds = [BlockDiagLinear, MonarchLinear, nn.Linear, LowRankLinear, LowRankLinear, LowRankConv]
    assert [type(layer) for layer in new] == kinds
    assert [new[3].rank, new[5].rank] == [2, 3]
    assert [layer.name for layer in report.layers] == ["0", "1", "3", "4", "5"]
    assert not report.skipped


def test_a_config_that_does_not_take_what_its_pattern_matches():
    """The pattern still decides, and the report explains."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3))
    new, report = compress(model, {"*": BlockDiagonal(2), nn.Conv1d: LOW_RANK}, progress=False)
    assert [type(layer) for layer in new] == [BlockDiagLinear, nn.Conv1d]
    assert report.skipped == {"1": "BlockDiagonal takes no Conv1d"}


@pytest.mark.parametrize(
    ("config", "layers", "error", "message"),
    [
        ({"0": LOW_RANK, "7": None}, "*", ValueError, "the pattern '7' matches no layer that could be compressed"),
        ({"0": LOW_RANK, "1": None}, "*", ValueError, "the pattern '1' matches no layer that .*; '1' is a ReLU"),
        ({"0": LOW_RANK, nn.Conv2d: LOW_RANK}, "*", ValueError, r"Conv2d'> matches no layer that could be compressed"),
        ({"0": LOW_RANK}, "0", ValueError, "leave out layers"),
        ({"*": None}, "*", ValueError, "matches no layer that could be compressed"),
        ({}, "*", ValueError, "the choice of layers matches no layer"),
        (LOW_RANK, {"0": 2}, TypeError, "patterns or a function, but got a mapping: pass it as config"),
        (LOW_RANK, None, TypeError, "expected layers to be patterns or a function, but got None"),
        (LOW_RANK, nn.Linear(2, 2), TypeError, "expected layers to be patterns or a function, but got Linear"),
        (LOW_RANK, ["0", 2], TypeError, "expected a glob, a regular expression or a class of layers, but got 2"),
        (LOW_RANK, int, TypeError, "a glob, a regular expression or a class of layers, but got <class 'int'>"),
        ({"0": 2}, "*", TypeError, r"expected a config such as blockdiag.LowRank\(\), or a mapping .*, but got 2"),
        (4, "*", TypeError, r"expected a config such as blockdiag.LowRank\(\), or a mapping .*, but got 4"),
        (None, "*", TypeError, r"expected a config such as blockdiag.LowRank\(\), or a mapping .*, but got None"),
        (LowRank, "*", TypeError, r"expected a config such as blockdiag.LowRank\(\), or a mapping .*, but got <class"),
    ],
)  # fmt: skip
def test_wrong_choices(config, layers, error, message):
    with pytest.raises(error, match=message):
        compress(mlp(8, 8, 8), config, layers, progress=False)


def test_layers_that_share_a_weight_need_equal_configs():
    model = mlp(8, 8, 8)
    model[2].weight = model[0].weight
    new, _ = compress(model, {"0": LowRank(rank=2, min_features=0), "2": LowRank(rank=2.0, min_features=0)})
    assert new[0].down.weight is new[2].down.weight
    with pytest.raises(ValueError, match="'0' and '2' share a weight, but get different configs"):
        compress(model, {"0": LowRank(rank=2, min_features=0), "2": LowRank(rank=3, min_features=0)})


def test_layers_that_are_compressed_already():
    """A config of their kind lowers their ranks, together with dense layers in one call; others are left alone."""
    model = mlp(24, 24, 24, 24, 24)
    configs = {"0": BlockDiagonal(4), "2": LowRank(rank=8, min_features=0), "4": Monarch(4, rank=2, min_features=0)}
    start, _ = compress(model, configs, progress=False)
    new, report = compress(start, LowRank(rank=4, min_features=0), progress=False)
    assert [type(layer) for layer in new[::2]] == [BlockDiagLinear, LowRankLinear, MonarchLinear, LowRankLinear]
    assert new[2].rank == new[6].rank == 4
    assert report.skipped == {
        "0": "compressed already: LowRank takes no BlockDiagLinear",
        "4": "compressed already: LowRank takes no MonarchLinear",
    }
    new, report = compress(start, LowRank(rank=4), progress=False)  # min_features applies to dense layers
    assert new[2].rank == 4
    assert report.skipped["6"] == "fewer than 256 features"
    for blocks in (None, 4, (4, 4)):
        new, report = compress(start, Monarch(num_blocks=blocks, rank=1), ["0", "4"], progress=False)
        assert (new[4].rank, new[4].num_blocks) == (1, (4, 4))
        assert list(report.skipped) == ["0"]
    with pytest.warns(UserWarning, match="nothing was compressed"):
        new, report = compress(start, Monarch(num_blocks=2, rank=1), "4", progress=False)
    assert report.skipped == {"4": "compressed already, with (4, 4) blocks and not (2, 2)"}
    assert new[4].rank == 2


def test_a_rank_that_would_not_fall():
    start, _ = compress(mlp(24, 24, 24), {"0": LowRank(rank=4, min_features=0), "2": LOW_RANK}, progress=False)
    new, report = compress(start, LowRank(rank=3), progress=False)
    assert (new[0].rank, new[2].rank) == (3, 2)
    assert report.skipped == {"2": "rank 3 would not save operations (up to 1 would)"}


def test_nothing_but_layers_that_are_compressed_already():
    blocks, _ = compress(mlp(8, 8), BlockDiagonal(2), progress=False)
    low_rank, _ = compress(mlp(8, 8), LOW_RANK, progress=False)
    for model, config in ((blocks, BlockDiagonal(4)), (blocks, LowRank()), (low_rank, Monarch())):
        for layers in ("*", "0", lambda name, layer: True):
            with pytest.raises(ValueError, match=r"could be compressed; compressed already: \['0'\]"):
                compress(model, config, layers, progress=False)
    with pytest.raises(ValueError, match="matches no layer that could be compressed"):
        compress(mlp(8, 8), LOW_RANK, blockdiag.LowRankLinear)


def test_kinds_of_their_own():
    """A new kind of layer needs only a new config."""

    class Halved(nn.Linear):
        pass

    class Half(blockdiag.compression.Config):
        takes = (nn.Linear,)
        makes = (Halved,)

        def check_budget(self, budget):
            assert budget is None

        def check(self, selected, budget):
            return "odd" if selected.layer.out_features % 2 else None

        @staticmethod
        def plan(chosen, moments, budget):
            def build(selected):
                return f"{len(chosen)} chosen"

            return build

    model = nn.Sequential(nn.Linear(4, 4), Halved(4, 4), nn.Linear(4, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, report = compress(model, {"0": Half(), "*": Half()}, progress=False)
    assert report.skipped == {"1": "compressed already: Half takes no Halved", "2": "odd", "0": "1 chosen"}
    assert [warning.filename for warning in caught] == [__file__]
