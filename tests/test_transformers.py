"""Hugging Face's Conv1D without the library: an equivalent class with the same name."""

import pytest
import torch
from torch import nn

from blockdiag import LowRank, compress
from blockdiag.integrations.transformers import conv1d_to_linear


class Conv1D(nn.Module):
    """y = x W + b, with W of shape (nx, nf)."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return x @ self.weight + self.bias


def test_computes_the_same_and_trains_on():
    model, x = nn.Sequential(Conv1D(12, 8), nn.ReLU(), Conv1D(8, 12)), torch.randn(5, 8)
    copied = conv1d_to_linear(model)
    assert [type(module) for module in copied] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(copied(x), model(x))
    twin = conv1d_to_linear(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for m, optimizer in zip((model, twin), optimizers, strict=True):
        step(m, optimizer)
    assert conv1d_to_linear(model, optimizers=optimizers[0], inplace=True) is model
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        step(m, optimizer)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    converted, _ = compress(model, LowRank(min_features=0), progress=False)
    assert converted(x).shape == (5, 8)


def test_messages():
    with pytest.raises(ValueError, match="expected a model with transformers' Conv1D inside"):
        conv1d_to_linear(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="matches no layer that could be compressed; '0' is a Conv1D"):
        compress(nn.Sequential(Conv1D(4, 4), nn.Linear(4, 4)), LowRank(), "0")
