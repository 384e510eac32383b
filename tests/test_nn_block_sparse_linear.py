"""BlockSparseLinear as a module: positions, conversions and errors."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from blockdiag import BlockSparseLinear
from blockdiag.nn._sparse_blocks import blocks_of

SIZES = [(16, 1), (16, 4), (4, 4), (1, 8), (8, 3)]


@pytest.mark.parametrize("density", [0.0, 0.01, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_positions(size, density):
    """As many blocks as asked for, in ascending order, and nearly equally many in each row."""
    layer = BlockSparseLinear(48, 32, size, density)
    rows, cols = 32 // size[0], 48 // size[1]
    assert len(layer.values) == round(density * rows * cols)
    counts = layer.crow_indices.diff()
    assert counts.max() - counts.min() <= 1
    kept = blocks_of(layer.weight.detach() != 0, size).any(-1).any(-1)
    assert torch.equal(kept.nonzero()[:, 1].int(), layer.col_indices)
    if 0.1 < density < 0.9:
        assert not torch.equal(BlockSparseLinear(48, 32, size, density).col_indices, layer.col_indices)


def test_seeds_and_initial_values():
    torch.manual_seed(3)
    first = BlockSparseLinear(256, 64, (16, 4), 0.25)
    torch.manual_seed(3)
    second = BlockSparseLinear(256, 64, (16, 4), 0.25)
    assert_close(dict(second.state_dict()), dict(first.state_dict()), rtol=0, atol=0)
    assert 0.115 < first.values.abs().max() <= 1 / 64**0.5  # 64 inputs for each output
    before = first.col_indices.clone()
    first.reset_parameters()
    assert torch.equal(first.col_indices, before)
    assert not torch.equal(first.values, second.values)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES[:4], ids=str)
def test_to_and_from_dense(size, bias, diagonal):
    layer = BlockSparseLinear(48, 48, size, 0.3, bias=bias, diagonal=diagonal)
    x = torch.randn(7, 48)
    dense = layer.eval().requires_grad_(False).to_dense()
    assert type(dense) is nn.Linear
    assert not dense.training
    assert not dense.weight.requires_grad
    assert_close(dense(x), layer(x))
    assert_close(dense.weight, layer.weight)
    again = BlockSparseLinear.from_dense(dense, size, 0.3 if not diagonal else 1.0, diagonal=diagonal)
    assert_close(again(x), layer(x))
    assert not again.training
    assert not again.values.requires_grad
    if not diagonal:
        assert_close(dict(again.state_dict()), dict(layer.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_the_largest_blocks_are_kept(dtype):
    dense = nn.Linear(40, 32, dtype=dtype)
    layer = BlockSparseLinear.from_dense(dense, (8, 4), 0.25)
    norms = blocks_of(dense.weight.detach(), (8, 4)).to(torch.complex128).abs().square().sum((-1, -2))
    kept = blocks_of(layer.weight.detach() != 0, (8, 4)).any(-1).any(-1)
    assert kept.sum() == 10
    assert norms[kept].min() >= norms[~kept].max()
    assert layer.values.dtype == dtype
    assert torch.equal(layer.weight[layer.weight != 0], dense.weight[layer.weight != 0])


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_inputs_decide_and_refit(bias, diagonal):
    """Better on the inputs than what the weight alone suggests, and no change to what is kept improves it."""
    torch.manual_seed(0)
    dense = nn.Linear(32, 64, bias=bias, dtype=torch.float64)
    x = torch.randn(500, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64) + 1
    x *= torch.linspace(0.01, 2, 32)

    def error(layer):
        return (layer(x) - dense(x)).square().sum()

    plain = BlockSparseLinear.from_dense(dense, (16, 4), 0.3, diagonal=diagonal)
    fitted = BlockSparseLinear.from_dense(dense, (16, 4), 0.3, diagonal=diagonal, inputs=x.view(50, 10, 32))
    assert error(fitted) < 0.5 * error(plain)
    grads = torch.autograd.grad(error(fitted), list(fitted.parameters()))
    scale = x.square().sum() * dense.weight.abs().max()
    assert all(grad.abs().max() < 1e-5 * scale for grad in grads)


def test_fewer_inputs_than_features():
    dense = nn.Linear(64, 32)
    x = torch.randn(5, 64)
    layer = BlockSparseLinear.from_dense(dense, (16, 1), 0.5, inputs=x)
    assert layer.values.isfinite().all()
    assert_close(layer(x), dense(x), rtol=0.02, atol=0.02)
    constant = BlockSparseLinear.from_dense(dense, (16, 1), 0.5, inputs=torch.zeros(5, 64))
    assert constant.values.isfinite().all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("noise", [0, 1e-7, 1e-3])
def test_inputs_that_hardly_vary(noise, bias):
    dense = nn.Linear(64, 32, bias=bias, dtype=torch.float64)
    row = 100 * torch.randn(64, dtype=torch.float64)
    x = row + noise * torch.randn(500, 64, dtype=torch.float64)
    layer = BlockSparseLinear.from_dense(dense, (16, 1), 0.25, inputs=x)
    assert layer.values.isfinite().all()
    assert_close(layer(x), dense(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_do_not_vary_drop_no_block(value):
    """A pruned weight keeps its blocks, also those of inputs that are constant in these rows."""
    dense = nn.Linear(64, 16)
    kept = torch.zeros(64, dtype=torch.bool)
    kept[torch.randperm(64)[:16]] = True
    with torch.no_grad():
        dense.weight.mul_(kept)
    x = torch.randn(1000, 64)
    x[:, :32] = value
    layer = BlockSparseLinear.from_dense(dense, (16, 1), 0.25, inputs=x)
    assert torch.equal(layer.col_indices.long(), kept.nonzero().flatten())


def test_fake_tensors_and_meta_weights():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        layer = BlockSparseLinear(64, 64, (16, 4), 0.3, diagonal=True)
        assert layer(torch.randn(3, 64)).shape == (3, 64)
    layer = BlockSparseLinear(64, 32, (16, 4), 0.3, device="meta")
    assert layer.weight.shape == (32, 64)
    assert layer.to_dense().weight.is_meta


def test_bsr():
    dense = torch.randn(32, 24) * (torch.rand(32, 24) < 0.05)
    weight = dense.to_sparse_bsr((4, 3))
    bias = torch.randn(32)
    layer = BlockSparseLinear.from_bsr(weight, bias)
    x = torch.randn(5, 24)
    assert_close(layer(x), nn.functional.linear(x, dense, bias))
    back = layer.to_bsr()
    assert back.layout == torch.sparse_bsr
    assert_close(back.to_dense(), dense)
    assert back.values().data_ptr() != layer.values.data_ptr()
    square = torch.block_diag(torch.ones(4, 4), torch.ones(4, 4))
    layer = BlockSparseLinear.from_bsr(square.to_sparse_bsr((4, 4)), diagonal=torch.arange(8.0))
    assert_close(layer.weight, square + torch.arange(8.0).diag())
    assert_close(layer.to_bsr().to_dense(), square)


def test_one_weight_in_several_square_matrices():
    """The diagonals of a recurrent layer's gates."""
    layer = BlockSparseLinear(16, 48, (16, 1), 0.2, diagonal=True)
    x = torch.randn(4, 16)
    assert_close(layer.to_dense()(x), layer(x))
    again = BlockSparseLinear.from_dense(layer.to_dense(), (16, 1), 1.0, diagonal=True)
    assert_close(again(x), layer(x))
    wanted = torch.stack([block.diagonal() for block in layer.weight.split(16)]).flatten()
    assert_close(again.diagonal, wanted)


def test_training_moves_what_is_kept_alone():
    layer = BlockSparseLinear(32, 32, (16, 1), 0.2, diagonal=True)
    zero = layer.weight.detach() == 0
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05)
    x, target = torch.randn(100, 32), torch.randn(100, 32)
    before = nn.functional.mse_loss(layer(x), target).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.95 * before
    assert torch.equal(layer.weight == 0, zero)


def test_no_block_is_a_bias_alone():
    layer = BlockSparseLinear(8, 6, (2, 2), 0.0)
    x = torch.randn(3, 8, requires_grad=True)
    output = layer(x)
    assert_close(output, layer.bias.expand(3, 6))
    output.sum().backward()
    assert torch.equal(x.grad, torch.zeros(3, 8))
    assert layer.values.grad.shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((30, 32, (16, 4)), ValueError, "expected in_features to be a multiple of the block's 4, but got 30"),
        ((32, 30, (16, 4)), ValueError, "expected out_features to be a multiple of the block's 16, but got 30"),
        ((64.0, 32, (16, 4)), TypeError, "expected in_features to be an int, but got 64.0"),
        ((-4, 32, (16, 4)), ValueError, "expected in_features to be a multiple"),
        ((32, 32, (16, 0)), ValueError, r"expected block_size to be positive, but got \(16, 0\)"),
        ((32, 32, (16,)), TypeError, r"expected block_size to be one or two ints, but got \(16,\)"),
        ((32, 32, "4"), TypeError, "expected block_size to be one or two ints, but got '4'"),
        ((32, 32, (4.0, 4)), TypeError, "expected block_size to be one or two ints"),
        ((32, 32, (True, 4)), TypeError, "expected block_size to be one or two ints"),
        ((32, 32, 4, 1.5), ValueError, "expected density to be from 0 to 1, but got 1.5"),
        ((32, 32, 4, -0.1), ValueError, "expected density to be from 0 to 1"),
        ((32, 32, 4, float("nan")), ValueError, "expected density to be from 0 to 1, but got nan"),
        ((32, 32, 4, "half"), TypeError, "expected density to be a number, but got 'half'"),
        ((32, 32, 4, True), TypeError, "expected density to be a number, but got True"),
        ((32, 48, 4, 0.1, True, True), ValueError, "out_features to be a multiple of in_features = 32 for a diagonal"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"BlockSparseLinear: .*{message}" if "BlockSparse" not in message else message):
        BlockSparseLinear(*arguments)


def test_errors_of_conversions():
    hooked = nn.Linear(16, 16)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"BlockSparseLinear.from_dense: linear has hooks"):
        BlockSparseLinear.from_dense(hooked)
    with pytest.raises(ValueError, match=r"is a torch.nn.modules.conv.Conv1d"):
        BlockSparseLinear.from_dense(nn.Conv1d(1, 1, 1))
    infinite = nn.Linear(16, 16)
    with torch.no_grad():
        infinite.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="expected the weight to be finite"):
        BlockSparseLinear.from_dense(infinite)
    with pytest.raises(ValueError, match=r"inputs to be in_features = 16, but got shape \(3, 15\)"):
        BlockSparseLinear.from_dense(nn.Linear(16, 16), inputs=torch.randn(3, 15))
    with pytest.raises(ValueError, match="expected inputs to be finite"):
        BlockSparseLinear.from_dense(nn.Linear(16, 16), inputs=torch.full((3, 16), torch.inf))
    with pytest.raises(
        ValueError, match=r"expected inputs to be real, as the weight, and at least one row, but got shape"
    ):
        BlockSparseLinear.from_dense(nn.Linear(16, 16), inputs=torch.randn(0, 16))
    with pytest.raises(ValueError, match="expected inputs to be real, as the weight"):
        BlockSparseLinear.from_dense(nn.Linear(16, 16), inputs=torch.randn(3, 16, dtype=torch.complex64))
    with pytest.raises(TypeError, match="expected inputs to be a tensor, but got list"):
        BlockSparseLinear.from_dense(nn.Linear(16, 16), inputs=[[1.0] * 16])
    with pytest.raises(TypeError, match=r"expected linear to be an nn.Linear, but got str"):
        BlockSparseLinear.from_dense("linear")
    with pytest.raises(ValueError, match="expected the weight to have values, but it is on the meta device"):
        BlockSparseLinear.from_dense(nn.Linear(16, 16, device="meta"))
    with pytest.raises(TypeError, match="expected bias to be a tensor, but got list"):
        BlockSparseLinear.from_bsr(torch.eye(4).to_sparse_bsr((2, 2)), [1.0])
    with pytest.raises(TypeError, match=r"expected a tensor of torch.sparse_bsr layout, but got torch.strided"):
        BlockSparseLinear.from_bsr(torch.randn(4, 4))
    with pytest.raises(
        ValueError, match=r"expected bias to have shape \(4,\) and the dtype torch.float32, but got \(3,\)"
    ):
        BlockSparseLinear.from_bsr(torch.eye(4).to_sparse_bsr((2, 2)), torch.randn(3))
    layer = BlockSparseLinear(16, 16)
    layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="BlockSparseLinear: has hooks"):
        layer.to_dense()


@pytest.mark.parametrize("shape", [(3, 32), (3, 128), (3, 64, 2), (64, 3), ()], ids=str)
def test_inputs_of_another_size(shape):
    """Fewer features than all blocks need, or more: the op itself would compute with the first ones."""
    layer = BlockSparseLinear(64, 32, (16, 4), 0.25)
    with pytest.raises(ValueError, match=r"expected input's last dimension to be in_features = 64, but got shape"):
        layer(torch.randn(shape))
    nested = torch.nested.nested_tensor([torch.randn(3, 32)], layout=torch.jagged)
    with pytest.raises(ValueError, match="in_features = 64"):
        layer(nested)


def test_other_positions_in_a_state_dict():
    """They load, and a state dict of another number of blocks does not."""
    layer, other = (BlockSparseLinear(64, 32, (16, 4), 0.25) for _ in range(2))
    x = torch.randn(3, 64)
    other.load_state_dict(layer.state_dict())
    assert_close(other(x), layer(x))
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        BlockSparseLinear(64, 32, (16, 4), 0.5).load_state_dict(layer.state_dict())


def test_device_and_dtype_moves():
    layer = BlockSparseLinear(64, 64, (16, 4), 0.25, diagonal=True)
    for moved in (layer.double(), layer.to(torch.bfloat16), layer.half(), layer.float().cpu()):
        assert moved.crow_indices.dtype == moved.col_indices.dtype == torch.int32
        assert moved(torch.randn(3, 64, dtype=moved.values.dtype)).dtype == moved.values.dtype
