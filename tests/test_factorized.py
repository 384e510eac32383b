"""LowRank and Monarch: the error is optimal, ranks follow the budget, and models keep training."""

import copy

import pytest
import torch
from torch import nn

from blockdiag import LowRank, LowRankConv, LowRankLinear, Monarch, MonarchLinear, compress
from blockdiag.compression.numerics import projection
from models import mlp


def factorize(model, config=LowRank, layers="*", *, calibration=None, budget=None, **settings):
    """compress, for layers of any size."""
    config = config(min_features=0, **settings)
    return compress(model, config, layers, calibration=calibration, budget=budget, progress=False)


def correlated(rows, features, dtype=torch.float64):
    return torch.randn(rows, features, dtype=dtype) @ torch.randn(features, features, dtype=dtype) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_low_rank_is_the_truncated_svd(dtype, device):
    model = mlp(24, 16, dtype=dtype).to(device)
    new, report = factorize(model, rank=4)
    values = torch.linalg.svdvals(model[0].weight.detach())
    best = (values[4:].square().sum() / values.square().sum()).sqrt().item()
    assert type(new[0]) is LowRankLinear
    assert report.layers[0].error == pytest.approx(best, rel=1e-4)
    difference = (new[0].weight - model[0].weight).norm() / model[0].weight.norm()
    assert difference.item() == pytest.approx(best, rel=1e-4)
    assert torch.equal(new[0].bias, model[0].bias)


@pytest.mark.parametrize("method", [LowRank, Monarch])
@pytest.mark.parametrize("bias", [False, True])
def test_calibration_lowers_the_error_of_the_outputs(method, bias):
    model = nn.Sequential(nn.Linear(24, 16, bias=bias, dtype=torch.float64))
    x = correlated(200, 24)
    structure = {"num_blocks": (4, 2), "rank": 2} if method is Monarch else {"rank": 4}
    blind, _ = factorize(model, method, **structure)
    new, report = factorize(model, method, calibration=[x[:100], (x[100:],)], **structure)
    error = ((new(x) - model(x)).norm() / (x @ model[0].weight.T).norm()).item()
    assert report.layers[0].calibrated
    assert report.layers[0].error == pytest.approx(error, rel=1e-6)
    assert error < 0.9 * ((blind(x) - model(x)).norm() / (x @ model[0].weight.T).norm()).item()


def test_low_rank_on_outputs_is_not_beaten_by_alternating_least_squares():
    """Composer's method: starts from the singular vectors, and refits each factor to the outputs in turn."""
    model, x = mlp(24, 16), correlated(200, 24)
    new, _ = factorize(model, rank=4, calibration=[x])
    y = model(x)
    centered_x, centered_y = x - x.mean(0), y - y.mean(0)
    left, values, right = torch.linalg.svd(model[0].weight.T, full_matrices=False)
    down, up = left[:, :4] * values[:4], right[:4]
    for _ in range(20):
        up = torch.linalg.lstsq(centered_x @ down, centered_y).solution
        down = torch.linalg.lstsq(centered_x, centered_y @ torch.linalg.pinv(up)).solution
        up = torch.linalg.lstsq(centered_x @ down, centered_y).solution
    theirs = (centered_x @ down @ up - centered_y).norm()
    assert (new(x) - y).norm() <= theirs * (1 + 1e-9)


def test_monarch_is_its_closed_form_optimum():
    model = mlp(24, 36, 24)
    new, report = factorize(model, Monarch, num_blocks=(4, 6))
    for index, layer in ((0, report.layers[0]), (2, report.layers[1])):
        weight, spectrum = model[index].weight, projection.spectrum(model[index].weight.detach(), (4, 6), None)
        best = (spectrum[1:].sum() / spectrum.sum()).sqrt().item()
        assert layer.error == pytest.approx(best)
        assert ((new[index].weight - weight).norm() / weight.norm()).item() == pytest.approx(best)
    usual, _ = factorize(model, Monarch)
    assert [usual[0].num_blocks, usual[2].num_blocks] == [(4, 6), (6, 4)]


CONVOLUTIONS = [
    (nn.Conv1d(12, 16, 5, padding="same", padding_mode="circular"), (12, 20)),
    (nn.Conv2d(12, 16, 3, stride=2, padding=1), (12, 9, 11)),
    (nn.Conv2d(12, 16, 1), (12, 5, 5)),
    (nn.Conv2d(24, 32, 1, groups=2), (24, 5, 5)),
    (nn.Conv2d(24, 16, 3, groups=2, padding=1, bias=False), (24, 6, 6)),
    (nn.Conv3d(6, 8, 2), (6, 4, 4, 4)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS, ids=lambda value: str(value))
def test_convolutions(conv, shape):
    model = nn.Sequential(copy.deepcopy(conv).double())
    x = torch.randn(6, *shape, dtype=torch.float64).cumsum(-1)
    blind, report = factorize(model, rank=2)
    weight = model[0].weight
    assert type(blind[0]) is LowRankConv
    per_group = weight.flatten(1).unflatten(0, (conv.groups, -1))
    left_out = torch.linalg.svdvals(per_group)[:, 2:].square().sum()
    assert report.layers[0].error == pytest.approx((left_out.sqrt() / weight.norm()).item())
    config = LowRank(rank=2, min_features=0)
    new, report = compress(model, config, calibration=[x], measure=1, progress=False)
    assert report.layers[0].cost_after.seconds > 0
    error = (new(x) - model(x)).norm()
    assert error < 0.99 * (blind(x) - model(x)).norm()
    bias = 0 if conv.bias is None else model[0].bias.view(-1, *[1] * (len(shape) - 1))
    assert report.layers[0].error == pytest.approx((error / (model(x) - bias).norm()).item(), rel=1e-6)


def test_ranks():
    """A number is a rank, a fraction is relative to the smaller side; conversions must save operations."""
    model = nn.Sequential(
        nn.Linear(32, 16), nn.Unflatten(-1, (16, 1)), nn.Conv1d(16, 64, 1), nn.Conv1d(64, 32, 1, groups=4)
    )
    new, _ = factorize(model)
    assert [new[0].rank, new[2].rank, new[3].rank] == [4, 4, 2]
    configs = {nn.Linear: LowRank(rank=11, min_features=0), nn.Conv1d: LowRank(rank=0.5, min_features=0)}
    new, report = compress(model, configs, progress=False)
    assert report.skipped == {"0": "rank 11 would not save operations (up to 10 would)"}
    assert type(new[0]) is nn.Linear
    assert [new[2].rank, new[3].rank] == [8, 4]
    configs = {nn.Linear: LowRank(min_features=17), nn.Conv1d: LowRank(min_features=32)}
    new, report = compress(model, configs, progress=False)
    assert report.skipped == {"0": "fewer than 17 features", "2": "fewer than 32 channels"}
    new, _ = factorize(model, layers="0", rank=3)
    assert new[0].rank == 3
    with pytest.warns(UserWarning, match="nothing was compressed"):
        same, report = compress(model, LowRank(), progress=False)
    assert all(type(a) is type(b) for a, b in zip(same, model, strict=True))


def low_rank_plus_noise(*sizes, rank):
    model = mlp(*sizes)
    for layer in model[::2]:
        product = torch.randn(layer.out_features, rank) @ torch.randn(rank, layer.in_features)
        layer.weight.data = product.double() + 0.05 * torch.randn_like(layer.weight)
    return model


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("method", [LowRank, Monarch])
def test_the_smallest_rank_within_an_error(method, calibrated):
    model = low_rank_plus_noise(40, 30, 50, rank=3)
    calibration = [correlated(400, 40)] if calibrated else None
    structure = {"num_blocks": 2} if method is Monarch else {}
    new, report = factorize(model, method, max_error=0.1, calibration=calibration, **structure)
    for layer, index in zip(report.layers, (0, 2), strict=True):
        rank = new[index].rank
        assert layer.error <= 0.1
        smaller, less = factorize(model, method, str(index), rank=rank - 1, calibration=calibration, **structure)
        assert less.layers[0].error > 0.1
        assert smaller[index].rank == rank - 1


def test_an_error_that_no_rank_reaches_leaves_the_layer():
    model = mlp(16, 16)
    with pytest.warns(UserWarning, match="nothing was compressed"):
        _, report = factorize(model, max_error=0.01)
    assert "no rank that saves operations (up to 7) has an error of at most 0.01" in report.skipped["0"]


def test_an_estimate_of_the_rank_is_no_reason_to_give_up():
    """Inputs that nearly cancel: the estimate from the submatrices' spectra is far off, and rank 1 is enough."""
    weight, low = torch.randn(64, 32), torch.randn(64, 1) @ torch.randn(1, 32)
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data = torch.cat([weight, low - weight], 1)
    x = torch.randn(2000, 32)
    x = torch.cat([x, x + 1e-4 * torch.randn(2000, 32)], 1)
    new, report = factorize(model, Monarch, num_blocks=2, max_error=0.1, calibration=[x])
    assert new[0].rank == 1
    assert report.layers[0].error < 1e-2


def test_equal_singular_values_share_the_budget():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for layer in model:
        nn.init.eye_(layer.weight)
    new, _ = factorize(model, budget=0.5)
    assert sum(p.numel() for layer in new for p in layer.parameters() if p.dim() > 1) == 64 * 64


@pytest.mark.parametrize("method", [LowRank, Monarch])
@pytest.mark.parametrize("budget", [0.2, 0.5, 0.8])
def test_operations_within_a_budget_go_where_they_help(method, budget):
    """Of two layers with equal size and error, the one with a few large singular values gets the lower rank."""
    model = nn.Sequential(low_rank_plus_noise(64, 64, rank=2)[0], nn.Linear(64, 64, dtype=torch.float64))
    structure = {"num_blocks": 2} if method is Monarch else {}
    new, _ = factorize(model, method, budget=budget, **structure)
    dense = 2 * 2 * 64 * 64
    total = sum(2 * sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in new)
    assert (budget - 0.1) * dense < total <= budget * dense
    assert type(new[0]) is (MonarchLinear if method is Monarch else LowRankLinear)
    assert type(new[1]) is nn.Linear or new[1].rank > new[0].rank
    with pytest.raises(ValueError, match=r"a budget of 0.001 is less than rank 1 of every layer needs"):
        factorize(model, method, budget=0.001, **structure)


@pytest.mark.parametrize("method", [LowRank, Monarch])
def test_lowered_rank(method):
    model, x = mlp(24, 36, 24), correlated(300, 24)
    structure = {"num_blocks": (2, 3), "rank": 4} if method is Monarch else {"rank": 12}
    start, _ = factorize(model, method, **structure)
    bound = torch.optim.Adam(start.parameters())
    start(x).square().sum().backward()
    bound.step()
    before = copy.deepcopy(start)
    lower = method(rank=2 if method is Monarch else 6)
    same, report = compress(start, lower, optimizers=bound, inplace=True, calibration=[x], progress=False)
    assert same is start
    assert [start[0].rank, start[2].rank] == [lower.rank] * 2
    assert [p for group in bound.param_groups for p in group["params"]] == list(start.parameters())
    error = (start[0](x) - before[0](x)).norm() / nn.functional.linear(x, before[0].weight).norm()
    assert report.layers[0].error == pytest.approx(error.item(), rel=1e-6)
    assert bound.state[start[0].bias] if method is LowRank else bound.state[start[0].second.bias]
    _, report = compress(start, lower, "0", dry_run=True, progress=False)
    assert "would not save operations" in report.skipped["0"]
    smaller, _ = compress(start, method(), budget=0.5, progress=False)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in start.parameters())


def test_lowered_rank_of_convolutions():
    model = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(24, 32, 1, groups=2))
    start, _ = factorize(model, rank=0.5)
    new, _ = compress(start, LowRank(rank=2), progress=False)
    assert [new[0].rank, new[2].rank] == [2, 2]
    assert new[0].down.stride == (2, 2)
    assert new(torch.randn(2, 16, 8, 8)).shape == (2, 32, 4, 4)


def test_training_goes_on():
    """Rebound optimizers train the factors; the state of biases and of unchanged layers is kept."""
    model, x = mlp(16, 32, 16), correlated(64, 16)
    bound = torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    for _ in range(3):
        bound.zero_grad()
        model(x).square().mean().backward()
        bound.step()
    moments = bound.state[model[0].bias]["exp_avg"].clone()
    compress(model, LowRank(min_features=0), "0", optimizers=bound, inplace=True, progress=False)
    assert bound.param_groups[0]["param_names"] == ["0.down.weight", "0.up.weight", "0.up.bias", "2.weight", "2.bias"]
    assert torch.equal(bound.state[model[0].up.bias]["exp_avg"], moments)
    losses = []
    for _ in range(20):
        bound.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        bound.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(bound.state) == set(model.parameters())


@pytest.mark.parametrize("method", [LowRank, Monarch])
@pytest.mark.parametrize("batch_first", [False, True])
def test_inside_attention(method, batch_first):
    """nn.MultiheadAttention reads its output projection's weight, also in its fused inference path."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    new, report = factorize(model, method)
    assert len(report.layers) == 6
    read = [layer for layer in report.layers if layer.name.endswith("out_proj")]
    assert all(layer.cost_after.operations == layer.cost_before.operations for layer in read)
    assert all(layer.cost_after.parameters < layer.cost_before.parameters for layer in read)
    assert all(layer.after.endswith("multiplied out") for layer in read)
    x = torch.randn(5, 3, 32)
    expected = new(x)
    expected.sum().backward()
    projection = new.layers[0].self_attn.out_proj
    assert all(p.grad is not None for p in projection.parameters())
    attention = copy.deepcopy(new.layers[0].self_attn)
    dense = nn.MultiheadAttention(32, 4, batch_first=batch_first)
    state = {k: v for k, v in attention.state_dict().items() if not k.startswith("out_proj")}
    dense.load_state_dict({**state, "out_proj.weight": projection.weight, "out_proj.bias": projection.bias})
    torch.testing.assert_close(attention(x, x, x), dense(x, x, x))
    new.eval()
    with torch.inference_mode():
        torch.testing.assert_close(new(x), expected)


def test_tied_layers_stay_tied():
    model = mlp(16, 16, 16)
    model[2].weight = model[0].weight
    new, _ = factorize(model, calibration=[correlated(100, 16)], rank=3)
    assert new[0].down.weight is new[2].down.weight
    assert new[0].up.weight is new[2].up.weight
    assert new[0].bias is not new[2].bias
    lower, _ = compress(new, LowRank(rank=2), progress=False)
    assert lower[0].down.weight is lower[2].down.weight
    assert lower[0].rank == 2


def test_float16_and_frozen_layers():
    model = mlp(16, 16, dtype=torch.float32).half().eval()
    model[0].weight.requires_grad_(False)
    new, report = factorize(model, rank=4)
    assert [(p.dtype, p.requires_grad) for p in new.parameters()] == [
        (torch.float16, False), (torch.float16, False), (torch.float16, True)]  # fmt: skip
    assert not new[0].training
    difference = (new[0].up.weight.double() @ new[0].down.weight.double() - model[0].weight.double()).norm()
    assert report.layers[0].error == pytest.approx((difference / model[0].weight.double().norm()).item(), rel=1e-6)


def test_sizes_that_are_not_divisible():
    model = mlp(8, 8)
    with pytest.raises(ValueError, match=r"'0' \(in_features=8, out_features=8\) cannot be split into \(3, 3\)"):
        compress(model, Monarch(num_blocks=3, min_features=0), inplace=True, progress=False)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("settings", [{}, {"max_error": 0.5}, {"budget": 0.6}], ids=str)
@pytest.mark.parametrize("config", [LowRank, Monarch])
def test_layers_without_inputs_are_left_alone(config, settings):
    model = nn.ModuleList([nn.Linear(0, 16), nn.Linear(16, 16)])
    with torch.no_grad():
        model[1].weight.fill_(1.0)  # of rank 1
    new, report = factorize(model, config, **settings)
    assert [layer.name for layer in report.layers] == ["1"]
    assert type(new[0]) is nn.Linear
    assert "operations (up to 0" in report.skipped["0"]
