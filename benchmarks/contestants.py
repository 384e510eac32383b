"""The ways to write a block-diagonal linear layer, one short function each.

A contestant takes a weight (G, N, K) and a bias (G * N) and returns its forward function, from concatenated input
(B, G * K) to concatenated output (B, G * N), and its parameters, in whatever form it keeps them.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import blockdiag

Contestant = Callable[[Tensor, Tensor], tuple[Callable[[Tensor], Tensor], list[Tensor]]]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def ours(weight: Tensor, bias: Tensor):
    weight, bias = _leaf(weight), _leaf(bias)
    return lambda x: blockdiag.linear(x, weight, bias), [weight, bias]


def loop(weight: Tensor, bias: Tensor):
    """A linear layer for each block, their outputs concatenated."""
    weights = [_leaf(block) for block in weight]
    biases = [_leaf(block) for block in bias.view(len(weights), -1)]

    def forward(x: Tensor) -> Tensor:
        slices = x.chunk(len(weights), dim=-1)
        return torch.cat([F.linear(*block) for block in zip(slices, weights, biases, strict=True)], dim=-1)

    return forward, [*weights, *biases]


def einsum(weight: Tensor, bias: Tensor):
    weight, bias = _leaf(weight), _leaf(bias)
    num_blocks, _, in_block = weight.shape

    def forward(x: Tensor) -> Tensor:
        return torch.einsum("bgk,gnk->bgn", x.view(-1, num_blocks, in_block), weight).flatten(1) + bias

    return forward, [weight, bias]


def baddbmm(weight: Tensor, bias: Tensor):
    """A batched product between two copies: into the batched layout and out of it."""
    weight, bias = _leaf(weight), _leaf(bias)
    num_blocks, out_block, in_block = weight.shape

    def forward(x: Tensor) -> Tensor:
        batched = x.view(-1, num_blocks, in_block).transpose(0, 1).contiguous()
        product = torch.baddbmm(bias.view(num_blocks, 1, out_block), batched, weight.mT)
        return product.transpose(0, 1).reshape(len(x), -1)

    return forward, [weight, bias]


def dense(weight: Tensor, bias: Tensor):
    """One linear layer with the zeros in place: what a masked dense weight costs without its mask."""
    weight, bias = _leaf(torch.block_diag(*weight)), _leaf(bias)
    return lambda x: F.linear(x, weight, bias), [weight, bias]


CONTESTANTS: dict[str, Contestant] = {function.__name__: function for function in (ours, loop, einsum, baddbmm, dense)}
