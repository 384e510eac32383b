"""The parts of the demonstration that its numbers rest on."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
example = pytest.importorskip("packed_ensemble_digits")


def test_calibration_of_known_predictions():
    """Four samples: two said to be 90 % sure, one of them right; two said to be 60 % sure, both right."""
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
