"""BlockSparse: compress keeps blocks, with everything around them."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from blockdiag import BlockSparse, BlockSparseLinear, compress
from blockdiag.nn._sparse_blocks import blocks_of
from models import mlp


def pruned(*sizes, block=(4, 2), density=0.25):
    """A model whose weights have been pruned in blocks."""
    model = mlp(*sizes)
    for layer in model:
        if isinstance(layer, nn.Linear):
            sparse = BlockSparseLinear.from_dense(layer, block, density)
            with torch.no_grad():
                layer.weight.copy_(sparse.weight)
    return model


@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_sparse_is_computed_exactly(calibrated):
    model = pruned(16, 32, 8)
    x = torch.randn(100, 16, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    new, report = compress(model, BlockSparse((4, 2), 0.25), calibration=[x] if calibrated else None, progress=False)
    assert_close(new(x), model(x))
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [layer.error for layer in report.layers] == [pytest.approx(0, abs=1e-6)] * 2
    assert [type(layer) for layer in new if not isinstance(layer, nn.ReLU)] == [BlockSparseLinear] * 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("diagonal", [False, True])
def test_reported_errors_are_those_of_the_outputs(diagonal, dtype, bias):
    model = mlp(24, 48, bias=bias, dtype=dtype)
    x = torch.randn(200, 24, dtype=dtype) @ torch.randn(24, 24, dtype=dtype) + 1
    config = BlockSparse((8, 2), 0.3, diagonal=diagonal)
    new, report = compress(model, config, calibration=[x], progress=False)
    (layer,) = report.layers
    outputs = x @ model[0].weight.mT
    assert layer.error == pytest.approx(((new(x) - model(x)).norm() / outputs.norm()).item(), rel=1e-4)
    assert [step.name for step in layer.steps] == ["largest blocks", "refitted"]
    assert layer.error < layer.steps[0].error
    weights, report = compress(model, config, progress=False)
    difference = weights[0].weight - model[0].weight
    assert report.layers[0].error == pytest.approx((difference.norm() / model[0].weight.norm()).item(), rel=1e-4)
    assert (new[0].diagonal is not None) == diagonal


def test_report_and_budget():
    model = mlp(64, 32, 64, dtype=torch.float32)
    new, report = compress(model, BlockSparse((16, 4)), budget=0.25, measure=8, progress=False)
    assert [layer.after for layer in report.layers] == [
        "BlockSparseLinear[16x4 blocks, 25%] 64→32",
        "BlockSparseLinear[16x4 blocks, 25%] 32→64",
    ]
    assert report.total("cost_after").operations == report.total("cost_before").operations // 4
    assert report.total("cost_after").seconds > 0
    assert new[0].density == 0.25
    with pytest.raises(ValueError, match="BlockSparse: expected either density or budget, but got neither"):
        compress(model, BlockSparse(), progress=False)
    with pytest.raises(ValueError, match="BlockSparse: expected either density or budget, but got both"):
        compress(model, BlockSparse(density=0.5), budget=0.5, progress=False)


def test_layers_that_are_left_alone_or_refused():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    _, report = compress(model, BlockSparse((8, 4), 0.5, min_features=16), progress=False)
    assert report.skipped == {"1": "fewer than 16 features"}
    with pytest.raises(ValueError, match="'1': expected out_features to be a multiple of the block's 16, but got 8"):
        compress(model, BlockSparse((16, 4), 0.5), progress=False)
    attention = nn.Sequential(nn.MultiheadAttention(16, 2))
    with pytest.warns(UserWarning, match="nothing was compressed"):
        _, report = compress(attention, BlockSparse(4, 0.5), progress=False)
    assert "split_attention" in report.skipped["0.out_proj"]


@pytest.mark.parametrize("diagonal", [False, True])
def test_optimizer_state_of_what_is_kept(diagonal):
    model = mlp(16, 16, 16, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    x = torch.randn(50, 16)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    step()
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    weight = model[0].weight.detach().clone()
    compress(model, BlockSparse((4, 2), 0.5, diagonal=diagonal), optimizers=optimizer, inplace=True, progress=False)
    layer = model[0]
    kept = torch.zeros(4, 8, dtype=torch.bool)
    rows = torch.arange(4).repeat_interleave(layer.crow_indices.diff().long())
    kept[rows, layer.col_indices.long()] = True
    wanted = blocks_of(moments["0.weight"], (4, 2))[kept]
    assert torch.equal(optimizer.state[layer.values]["exp_avg"], wanted)
    assert torch.equal(optimizer.state[layer.bias]["exp_avg"], moments["0.bias"])
    if diagonal:
        assert torch.equal(optimizer.state[layer.diagonal]["exp_avg"], moments["0.weight"].diagonal())
        assert_close(layer.weight.diagonal(), weight.diagonal())
    before = layer.values.detach().clone()
    step()
    assert not torch.equal(layer.values, before)


def test_shared_weights_stay_shared():
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    model = nn.ModuleDict({"a": first, "b": second})

    def run(model):
        return model["b"](model["a"](torch.randn(30, 16)))

    x = torch.randn(60, 16)
    model.forward = lambda x: model["b"](model["a"](x))
    del model.forward
    new, _ = compress(model, BlockSparse((4, 4), 0.5), calibration=run, progress=False)
    assert new["a"].values is new["b"].values
    assert new["a"].bias is not new["b"].bias
    assert_close(new["a"](x) - new["a"].bias, new["b"](x) - new["b"].bias)


def test_masks_of_torch_ao_pruning():
    """A model that torch's sparsifier pruned in blocks keeps just what the sparsifier kept."""
    from torch.ao.pruning import WeightNormSparsifier

    model = mlp(32, 64, 16, dtype=torch.float32)
    sparsifier = WeightNormSparsifier(sparsity_level=0.75, sparse_block_shape=(4, 2), zeros_per_block=8)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
    sparsifier.step()
    x = torch.randn(10, 32)
    expected = model(x)
    with pytest.raises(ValueError, match="'0' is parametrized"):
        compress(model, BlockSparse((4, 2), 0.25), progress=False)
    sparsifier.squash_mask()
    new, report = compress(model, BlockSparse((4, 2), 0.25), progress=False)
    assert_close(new(x), expected)
    assert [layer.error for layer in report.layers] == [0, 0]
