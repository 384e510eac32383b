"""The functions that compute the examples' numbers."""

import copy
import re
import sys
from pathlib import Path

import pytest
import torch

from blockdiag import compress

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
example = pytest.importorskip("packed_ensemble_digits")
does_it_pay = pytest.importorskip("does_it_pay")
prune_blocks = pytest.importorskip("prune_blocks")


def test_calibration_of_known_predictions():
    """Four samples: two with a confidence of 90 %, one of them right; two with 60 %, both right."""
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    labels = torch.tensor([0, 1, 1, 1])
    confidence, accuracy, share, error = example.calibration(probabilities, labels, bins=10)
    assert share.nonzero().flatten().tolist() == [6, 9]
    torch.testing.assert_close(confidence[[6, 9]], torch.tensor([0.6, 0.9], dtype=torch.float64), atol=1e-6, rtol=0)
    assert accuracy[[6, 9]].tolist() == [1.0, 0.5]
    assert error == pytest.approx(0.5 * 0.4 + 0.5 * 0.4, abs=1e-6)


def test_scores():
    probabilities = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    accuracy, nll, ece = example.scores(probabilities, torch.tensor([0, 0]))
    assert (accuracy, nll) == (1.0, pytest.approx(0.5 * 0.6931, abs=1e-4))
    assert ece == pytest.approx(0.25)


def test_packed_and_loop_compute_the_same_with_the_same_gradients():
    packed = example.PackedEnsemble(members=3, hidden=5)
    loop = example.LoopEnsemble(packed)
    images, labels = torch.rand(7, 3, 64), torch.randint(10, (7, 3))
    for model in (packed, loop):
        example.loss_of(model(images), labels).backward()
    torch.testing.assert_close(packed(images), loop(images))
    for index, layer in enumerate(packed.layers):
        grads = torch.stack([network[2 * index].weight.grad for network in loop.networks])
        torch.testing.assert_close(layer.weight.grad, grads)


def result(method, parameters, accuracy, milliseconds):
    return does_it_pay.Result(method, parameters, 2 * parameters, None, accuracy, 0.0, {128: milliseconds})


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([result("blocks", 25, 0.98, 2.0)], "pays: blocks with 25% of the parameters runs 5.00 times as fast at .0.00"),
        ([result("blocks", 25, 0.98, 9.0)], "does not pay: blocks"),
        ([result("blocks", 25, 0.90, 2.0)], "no conversion is within 0.3 points of the dense network"),
        ([result("blocks", 25, 0.98, 2.0), result("smaller dense", 25, 0.99, 1.0)], "does not pay: blocks"),
        ([result("blocks", 25, 0.98, 2.0), result("smaller dense", 25, 0.979, 1.0)], "pays: blocks .* 10.00 times"),
    ],
)
def test_whether_it_pays(others, expected):
    assert re.search(expected, does_it_pay.conclude([result("dense", 100, 0.98, 10.0), *others], tolerance=0.003))


def test_smaller_networks_have_about_as_many_parameters():
    for hidden in (64, 1024):
        parameters, _ = does_it_pay.costs(does_it_pay.make_network(hidden, torch.device("cpu")))
        assert does_it_pay.smaller_hidden(parameters) == hidden
        assert does_it_pay.smaller_hidden(parameters // 4) < hidden // 1.5


@pytest.mark.parametrize("method", ["blocks", "low rank", "Monarch"])
def test_methods_keep_their_budgets(method):
    model = does_it_pay.make_network(64, torch.device("cpu"))
    for budget in does_it_pay.budgets(method, 64):
        config, calibration = does_it_pay.METHODS[method], [torch.rand(100, 64)]
        compressed, _ = compress(model, config, does_it_pay.HIDDEN_LAYER, budget=budget, calibration=calibration)
        weights = sum(p.numel() for p in compressed[2].parameters() if p.dim() > 1)
        assert 0.9 * budget * 64 * 64 <= weights <= budget * 64 * 64


@pytest.mark.parametrize("block", [(16, 1), (8, 4)])
def test_pruning_keeps_what_it_should(block):
    """As many blocks as asked for, and a network that has learned."""
    data = does_it_pay.load_data(0, torch.device("cpu"))
    dense = does_it_pay.make_network(64, torch.device("cpu"))
    does_it_pay.train(dense, data, 6, 3e-3)
    before = copy.deepcopy(dense.state_dict())
    sparse, when_pruned = prune_blocks.prune(dense, block, 0.25, data, 6)
    assert sparse[2].block_size == block
    assert sparse[2].density == 0.25
    assert when_pruned > 0.5
    assert does_it_pay.accuracy(sparse, data) > 0.8
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)


def test_conclusion_on_pruning():
    dense = result("dense", 100, 0.98, 10.0)
    text = prune_blocks.conclude([dense, result("16x4", 25, 0.979, 2.0), result("blocks", 12, 0.98, 1.0)], 0.003)
    assert "16x4 with 25% of the parameters runs 5.00 times as fast at -0.10 points" in text
    assert "the fastest of all: blocks with 12%" in text
    assert "no sparse network is within" in prune_blocks.conclude([dense, result("16x4", 25, 0.9, 2.0)], 0.003)
