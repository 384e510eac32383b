"""GroupLasso: the penalty, and the proximal step that makes blocks zero."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from blockdiag import BlockSparse, compress
from blockdiag.compression import GroupLasso
from blockdiag.nn._sparse_blocks import blocks_of


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_the_step_is_the_proximal_operator(dtype):
    """Minimizes half the squared distance plus the penalty: the gradient of that is zero, or the block is."""
    weight = torch.randn(32, 12, dtype=dtype, requires_grad=True)
    before, lasso = weight.detach().clone(), GroupLasso([weight], (8, 3), 0.5)
    lasso.step(torch.tensor(2.0))
    moved = weight.detach().to(torch.complex128)
    blocks, old = blocks_of(moved, (8, 3)), blocks_of(before.to(torch.complex128), (8, 3))
    threshold = 2.0 * 0.5 * 24**0.5
    norms = old.abs().square().sum((-1, -2), keepdim=True).sqrt()
    expected = old * (1 - threshold / norms).clamp(min=0)
    assert_close(blocks, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    kept = norms[..., 0, 0] > threshold
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(blocks.abs().sum((-1, -2)) > 0, kept)
    assert lasso.density == kept.double().mean().item()


def test_penalty():
    weights = [torch.randn(16, 8, requires_grad=True), torch.randn(4, 12, requires_grad=True)]
    penalty = GroupLasso(weights, (4, 4), 0.1).penalty()
    expected = sum(block.norm() for w in weights for rows in w.split(4) for block in rows.split(4, 1))
    assert_close(penalty, 0.1 * 4 * expected)
    penalty.backward()
    assert all(weight.grad is not None for weight in weights)


def test_blocks_of_zeros_stay():
    weight = torch.zeros(8, 8)
    GroupLasso([weight], 4, 0.0).step(0.1)
    assert torch.equal(weight, torch.zeros(8, 8))
    weight = torch.eye(8)
    GroupLasso([weight], 4, 0.0).step(0.1)
    assert torch.equal(weight, torch.eye(8))


def test_finds_the_blocks_that_matter():
    """Training with it recovers a sparse layer, and compress keeps just that."""
    torch.manual_seed(0)
    teacher = torch.zeros(16, 32)
    teacher[:8, :4] = torch.randn(8, 4)
    teacher[8:, 20:24] = torch.randn(8, 4)
    x = torch.randn(2000, 32)
    y = x @ teacher.T + 0.1 * torch.randn(2000, 16)
    model = nn.Sequential(nn.Linear(32, 16))
    optimizer, lasso = torch.optim.SGD(model.parameters(), lr=0.5), GroupLasso([model[0].weight], (8, 4), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        lasso.step(0.5)
    assert lasso.density == 2 / 16
    sparse, report = compress(model, BlockSparse((8, 4), lasso.density), progress=False)
    assert report.layers[0].error == 0
    assert torch.equal(
        (blocks_of(sparse[0].weight, (8, 4)) != 0).any(-1).any(-1), blocks_of(teacher, (8, 4)).any(-1).any(-1)
    )


@pytest.mark.parametrize(
    ("weights", "block", "strength", "error", "message"),
    [
        (torch.randn(4, 4), 2, 0.1, TypeError, "expected an iterable of weights, but got a tensor"),
        ([], 2, 0.1, ValueError, "expected at least one weight"),
        ([nn.Linear(4, 4)], 2, 0.1, TypeError, "expected weights to be tensors, but got Linear"),
        ([torch.randn(4)], 2, 0.1, ValueError, "expected weights to be matrices"),
        (
            [torch.randn(4, 6)],
            (2, 4),
            0.1,
            ValueError,
            "expected in_features to be a multiple of the block's 4, but got 6",
        ),
        ([torch.randn(4, 4)], 0, 0.1, ValueError, "expected block_size to be positive"),
        ([torch.randn(4, 4)], 2, -1, ValueError, "expected strength to be finite and not negative, but got -1"),
        ([torch.randn(4, 4)], 2, float("nan"), ValueError, "expected strength to be finite"),
        ([torch.randn(4, 4)], 2, "1", TypeError, "expected strength to be a number, but got '1'"),
    ],
)
def test_errors(weights, block, strength, error, message):
    with pytest.raises(error, match=message):
        GroupLasso(weights, block, strength)
    weight = torch.ones(4, 4)
    with pytest.raises(ValueError, match="expected learning_rate to be finite and not negative"):
        GroupLasso([weight], 2, 1.0).step(-0.1)
    assert torch.equal(weight, torch.ones(4, 4))
