"""Models to convert, shared by the conversion tests."""

import itertools

import torch
from torch import nn


def mlp(*sizes, bias=True, dtype=torch.float64):
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def hidden_blocks(num_blocks, out_features, in_features, permute):
    """A linear layer whose weight is block diagonal after hidden permutations."""
    blocks = [torch.randn(out_features // num_blocks, in_features // num_blocks) for _ in range(num_blocks)]
    linear = nn.Linear(in_features, out_features, dtype=torch.float64)
    weight = torch.block_diag(*blocks)
    if permute:
        weight = weight[torch.randperm(out_features)][:, torch.randperm(in_features)]
    linear.weight = nn.Parameter(weight.double())
    return linear
