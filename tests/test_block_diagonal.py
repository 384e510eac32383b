"""BlockDiagonal: approximation error, permutations, and reports."""

import copy
import random
import re

import pytest
import torch
from torch import nn

from blockdiag import BlockDiagLinear, BlockDiagonal, PermutedBlockDiagLinear, compress
from blockdiag.compression.numerics import projection
from models import hidden_blocks, mlp


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_block_diagonal_is_computed_exactly(permute, calibrated, device):
    if permute and device != "cpu":  # a machine with a GPU may have no package index
        pytest.importorskip("scipy")
        pytest.importorskip("sklearn")
    model = nn.Sequential(hidden_blocks(4, 16, 32, permute), nn.GELU(), hidden_blocks(2, 24, 16, permute)).to(device)
    x = torch.randn(100, 32, dtype=torch.float64, device=device)
    calibration = [x[:60], x[60:]] if calibrated else None
    before = copy.deepcopy(model.state_dict())
    configs = {"0": BlockDiagonal(4, permute=permute), "2": BlockDiagonal(2, permute=permute)}
    new, report = compress(model, configs, calibration=calibration, progress=False)
    torch.testing.assert_close(new(x), model(x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert type(new[0]) is (PermutedBlockDiagLinear if permute else BlockDiagLinear)
    assert [layer.error for layer in report.layers] == [pytest.approx(0, abs=1e-6)] * 2
    if not permute:
        assert type(new[0]) is type(new[2]) is BlockDiagLinear


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_reported_errors_are_those_of_the_outputs(permute, bias, dtype):
    model = mlp(24, 16, bias=bias, dtype=dtype)
    x = torch.randn(200, 24, dtype=dtype) @ torch.randn(24, 24, dtype=dtype) + 1
    new, report = compress(model, BlockDiagonal(4, permute=permute), calibration=[x], progress=False)
    (layer,) = report.layers
    outputs = x @ model[0].weight.mT
    assert layer.error == pytest.approx(((new(x) - model(x)).norm() / outputs.norm()).item(), rel=1e-4)
    diagonal = BlockDiagLinear.from_dense(model[0], 4)
    assert layer.steps[0].error == pytest.approx(((diagonal(x) - model(x)).norm() / outputs.norm()).item(), rel=1e-4)
    assert layer.error < layer.steps[0].error
    weights, report = compress(model, BlockDiagonal(4, permute=permute), progress=False)
    difference = weights[0].to_dense().weight - model[0].weight
    assert report.layers[0].error == pytest.approx((difference.norm() / model[0].weight.norm()).item(), rel=1e-4)


def test_folded_permutations_change_nothing():
    """Between the layers of an nn.Sequential, permutations merge or are folded in; the function stays the same."""
    torch.manual_seed(1)
    model = mlp(8, 16, 16, 16, 16, 8)
    model.insert(3, nn.Sequential(nn.Softmax(-1)))  # not elementwise: no permutation passes it
    x = torch.randn(50, 8, dtype=torch.float64)
    unfolded = copy.deepcopy(model)
    for module in model:
        module.register_forward_hook(lambda *_: None)  # a hook could observe the order: nothing is folded
    by_hand, _ = compress(model, BlockDiagonal(4, permute=True), ["2", "5", "7"], progress=False)
    folded, _ = compress(unfolded, BlockDiagonal(4, permute=True), ["2", "5", "7"], progress=False)
    torch.testing.assert_close(folded(x), by_hand(x))

    def permutations(model):
        layers = [module for module in model if isinstance(module, PermutedBlockDiagLinear)]
        return sum((m.input_permutation is not None) + (m.output_permutation is not None) for m in layers)

    assert permutations(by_hand) == 6
    # Layer "0" takes over the one before "2", layer "9" the one after "7"; those between "5" and "7" merge into one.
    # The output permutation of "2" and the input permutation of "5" stay.
    assert permutations(folded) == 3
    assert not torch.equal(folded[0].weight, model[0].weight)


class Block(nn.Module):
    """Two linear layers and the functions between them in a forward; `kind` selects how they are used."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.up, self.down = nn.Linear(8, 16, dtype=torch.float64), nn.Linear(16, 8, dtype=torch.float64)

    def forward(self, x):
        hidden = nn.functional.dropout(nn.functional.gelu(self.up(x)).tanh(), 0.0, self.training)
        output = self.down(hidden)
        if self.kind == "used twice":
            output = output + hidden.sum(-1, keepdim=True)
        elif self.kind == "called twice":
            output = output + self.down(hidden.softmax(-1))
        elif self.kind == "weight read":
            output = output + self.down.weight.sum()
        elif self.kind == "other in training" and self.training:
            output = output * hidden[..., :1]
        elif self.kind == "depends on data" and x.sum() > 0:
            output = -output
        return output


@pytest.mark.parametrize(
    ("kind", "folded"),
    [("chain", True)]
    + [(kind, False) for kind in ("used twice", "called twice", "weight read", "other in training", "depends on data")],
)
def test_permutations_are_folded_where_a_forward_leads_from_layer_to_layer(kind, folded):
    model, x = nn.Sequential(Block(kind), nn.Linear(8, 8, dtype=torch.float64)), torch.randn(20, 8, dtype=torch.float64)
    new, _ = compress(model, BlockDiagonal(4, permute=True), "0.*", progress=False)
    assert (new[0].up.output_permutation is None) == folded
    hooked = copy.deepcopy(model)
    for module in hooked.modules():
        module.register_forward_hook(lambda *_: None)
    expected, _ = compress(hooked, BlockDiagonal(4, permute=True), "0.*", progress=False)
    for mode in (True, False):
        torch.testing.assert_close(new.train(mode)(x), expected.train(mode)(x))
        torch.testing.assert_close(new(-x), expected(-x))


def test_budget():
    model = mlp(24, 36, 30)
    new, report = compress(model, BlockDiagonal(), budget=0.3, progress=False)
    assert [new[0].num_blocks, new[2].num_blocks] == [4, 6]
    assert report.total("cost_after").operations == 2 * (24 * 36 // 4 + 36 * 30 // 6)


def test_dry_run_and_report():
    model = mlp(8, 8, 4, dtype=torch.float32)
    before = copy.deepcopy(model)
    same, report = compress(
        model, BlockDiagonal(2, min_features=5), dry_run=True, inplace=True, measure=16, progress=False
    )
    assert same is model
    assert repr(model) == repr(before)
    (layer,) = report.layers
    assert (layer.cost_before.parameters, layer.cost_after.parameters) == (72, 40)
    assert (layer.cost_before.operations, layer.cost_after.operations) == (128, 64)
    assert (layer.cost_before.bytes, layer.cost_after.bytes) == (288, 160)
    assert layer.cost_after.seconds > 0
    assert report.skipped == {"2": "fewer than 5 features"}
    assert re.search(r"0 +Linear 8→8 +BlockDiagLinear\[2 blocks\] 8→8 +72 > 40", str(report))
    assert report.as_dict()["layers"][0]["cost_after"][0] == 40


@pytest.mark.parametrize("nested", [False, True])
def test_transformer_encoder(nested):
    """The fused inference path reads dense weights: it must be disabled for converted layers."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    new, report = compress(model, BlockDiagonal(4), progress=False)
    assert len(report.layers) == 4
    assert sorted(report.skipped) == ["layers.0.self_attn.out_proj", "layers.1.self_attn.out_proj"]
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    new.train()
    for module in new.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    expected = new(x, src_key_padding_mask=mask)
    new.eval()
    with torch.inference_mode():
        output = new(x, src_key_padding_mask=mask)
    torch.testing.assert_close(output[~mask], expected[~mask])


def test_nothing_to_convert():
    """Warns, and still returns a copy."""
    model = mlp(8, 8)
    with pytest.warns(UserWarning, match="nothing was compressed: .*fewer than 9 features"):
        new, report = compress(model, BlockDiagonal(2, min_features=9), progress=False)
    assert new is not model
    assert type(new[0]) is nn.Linear
    assert not report.layers


class UsedAsList(nn.Module):
    """An nn.Sequential that is never called: its structure is not the computation."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(hidden_blocks(4, 32, 32, True), nn.ReLU(), hidden_blocks(4, 32, 32, True))

    def forward(self, x):
        hidden = self.layers[0](x)
        return self.layers[2](self.layers[1](hidden)) + hidden


def test_permutations_are_not_folded_into_what_only_looks_like_a_chain():
    model, x = UsedAsList(), torch.randn(20, 32, dtype=torch.float64)
    new, _ = compress(model, BlockDiagonal(4, permute=True), progress=False)
    torch.testing.assert_close(new(x), model(x))


def test_reported_errors_are_those_of_the_stored_blocks():
    model = mlp(16, 16, dtype=torch.float32).bfloat16()
    x = torch.randn(100, 16).bfloat16()
    model[0].weight.data = torch.block_diag(*torch.randn(4, 4, 4)).bfloat16()
    new, report = compress(model, BlockDiagonal(4), calibration=[x[:8].repeat(10, 1)], progress=False)
    difference = new[0].to_dense().weight.double() - model[0].weight.double()
    outputs = x[:8].double() @ model[0].weight.double().T
    shift = (new[0].bias - model[0].bias).double()
    actual = (x[:8].double() @ difference.T + shift).norm() / outputs.norm()
    assert report.layers[0].error == pytest.approx(actual.item(), abs=2e-3)


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    _, report = compress(model, BlockDiagonal(4), progress=False)
    assert report.total("cost_before").parameters == 64 * 64
    assert report.total("cost_after").parameters == 64 * 16
    assert report.total("cost_after").operations == 2 * 2 * 64 * 16


def test_missing_scipy_is_told_of(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy scikit-learn"):
        compress(mlp(4, 4), BlockDiagonal(2, permute=True), progress=False)


def test_few_calibration_rows_are_warned_of():
    with pytest.warns(UserWarning, match="'0' has 8 inputs, but was calibrated on only 5 rows"):
        compress(mlp(8, 8), BlockDiagonal(2), calibration=[torch.randn(5, 8, dtype=torch.float64)], progress=False)


def test_the_search_for_permutations_keeps_the_random_state(monkeypatch):
    """Its libraries may draw from it: scikit-learn does, when it is first imported."""
    find = projection.find_permutations
    monkeypatch.setattr(projection, "find_permutations", lambda *args: (random.random(), find(*args))[1])
    state = random.getstate()
    compress(mlp(8, 8), BlockDiagonal(2, permute=True), progress=False)
    assert random.getstate() == state
