"""replace_linear: what it replaces, what carries over, and that bad input changes nothing."""

import copy
import itertools
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from blockdiag import BlockDiagLinear, PermutedBlockDiagLinear, factorize, replace_linear


def mlp(*sizes, bias=True, dtype=torch.float64):
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def hidden_blocks(num_blocks, out_features, in_features, permute):
    """A linear layer whose weight is block diagonal, in an order that nobody knows."""
    blocks = [torch.randn(out_features // num_blocks, in_features // num_blocks) for _ in range(num_blocks)]
    linear = nn.Linear(in_features, out_features, dtype=torch.float64)
    weight = torch.block_diag(*blocks)
    if permute:
        weight = weight[torch.randperm(out_features)][:, torch.randperm(in_features)]
    linear.weight = nn.Parameter(weight.double())
    return linear


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_is_block_diagonal_is_computed_exactly(permute, calibrated, device):
    if permute and device != "cpu":  # where the GPU is, there may be no package index
        pytest.importorskip("scipy")
        pytest.importorskip("sklearn")
    model = nn.Sequential(hidden_blocks(4, 16, 32, permute), nn.GELU(), hidden_blocks(2, 24, 16, permute)).to(device)
    x = torch.randn(100, 32, dtype=torch.float64, device=device)
    calibration = [x[:60], x[60:]] if calibrated else None
    before = copy.deepcopy(model.state_dict())
    new, report = replace_linear(model, {"0": 4, "2": 2}, permute=permute, calibration=calibration, progress=False)
    torch.testing.assert_close(new(x), model(x))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert isinstance(new[0], BlockDiagLinear)
    assert [layer.error for layer in report.layers] == [pytest.approx(0, abs=1e-6)] * 2
    if not permute:
        assert type(new[0]) is type(new[2]) is BlockDiagLinear


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_reported_errors_are_those_of_the_outputs(permute, bias, dtype):
    model = mlp(24, 16, bias=bias, dtype=dtype)
    x = torch.randn(200, 24, dtype=dtype) @ torch.randn(24, 24, dtype=dtype) + 1
    new, report = replace_linear(model, num_blocks=4, permute=permute, calibration=[x], progress=False)
    (layer,) = report.layers
    outputs = x @ model[0].weight.mT
    assert layer.error == pytest.approx(((new(x) - model(x)).norm() / outputs.norm()).item(), rel=1e-4)
    diagonal = BlockDiagLinear.from_dense(model[0], 4)
    assert layer.steps[0].error == pytest.approx(((diagonal(x) - model(x)).norm() / outputs.norm()).item(), rel=1e-4)
    assert layer.error < layer.steps[0].error
    weights, report = replace_linear(model, num_blocks=4, permute=permute, progress=False)
    difference = weights[0].to_dense().weight - model[0].weight
    assert report.layers[0].error == pytest.approx((difference.norm() / model[0].weight.norm()).item(), rel=1e-4)


def test_folded_permutations_change_nothing():
    """Between layers of one nn.Sequential permutations meet or are taken over; the function stays the same."""
    torch.manual_seed(1)
    model = mlp(8, 16, 16, 16, 16, 8)
    model.insert(3, nn.Sequential(nn.Softmax(-1)))  # no elementwise function: nothing passes it
    x = torch.randn(50, 8, dtype=torch.float64)
    unfolded = copy.deepcopy(model)
    for module in model:
        module.register_forward_hook(lambda *_: None)  # a hook could see the order: nothing is folded
    by_hand, _ = replace_linear(model, ["2", "5", "7"], num_blocks=4, permute=True, progress=False)
    folded, _ = replace_linear(unfolded, ["2", "5", "7"], num_blocks=4, permute=True, progress=False)
    torch.testing.assert_close(folded(x), by_hand(x))

    def permutations(model):
        layers = [module for module in model if isinstance(module, PermutedBlockDiagLinear)]
        return sum((m.input_permutation is not None) + (m.output_permutation is not None) for m in layers)

    assert permutations(by_hand) == 6
    # In front of "2" layer "0" takes it over, behind "7" layer "9" does; between "5" and "7" two become one. What
    # leaves "2" and enters "5" has to stay.
    assert permutations(folded) == 3
    assert not torch.equal(folded[0].weight, model[0].weight)


class Block(nn.Module):
    """Two linear layers with what is between them in a forward; `kind` says how they are used."""

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
    new, _ = replace_linear(model, "0.*", num_blocks=4, permute=True, progress=False)
    assert (new[0].up.output_permutation is None) == folded
    hooked = copy.deepcopy(model)
    for module in hooked.modules():
        module.register_forward_hook(lambda *_: None)
    expected, _ = replace_linear(hooked, "0.*", num_blocks=4, permute=True, progress=False)
    for mode in (True, False):
        torch.testing.assert_close(new.train(mode)(x), expected.train(mode)(x))
        torch.testing.assert_close(new(-x), expected(-x))


@pytest.mark.parametrize(
    "policy",
    ["encoder.*", re.compile(r"^encoder\.\d"), ["encoder.0", "encoder.2"], {"encoder.*": 2},
     lambda name, layer: layer.out_features == 8, lambda name, layer: 2 if name.startswith("encoder") else None],
    ids=["glob", "regex", "list", "mapping", "predicate", "number"],
)  # fmt: skip
def test_policies(policy):
    model = nn.ModuleDict({"encoder": mlp(8, 8, 8), "head": nn.Linear(8, 4)})
    new, report = replace_linear(model, policy, num_blocks=2, progress=False)
    assert [layer.name for layer in report.layers] == ["encoder.0", "encoder.2"]
    assert [type(m) for m in (new["encoder"][0], new["encoder"][2], new["head"])] == [BlockDiagLinear] * 2 + [nn.Linear]
    assert new["encoder"][0].num_blocks == 2


def test_parameter_budget():
    model = mlp(24, 36, 30)
    new, report = replace_linear(model, parameter_budget=0.3, progress=False)
    assert [new[0].num_blocks, new[2].num_blocks] == [4, 6]
    assert report.total("cost_after").operations == 2 * (24 * 36 // 4 + 36 * 30 // 6)


def test_what_carries_over():
    model = mlp(8, 8, 8, dtype=torch.float32).eval()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    calls = []
    handle = model[0].register_forward_hook(lambda module, *_: calls.append(type(module)))
    replace_linear(model, num_blocks=2, inplace=True, progress=False)
    assert not model[0].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False]
    model(torch.randn(3, 8))
    assert calls == [BlockDiagLinear]
    handle.remove()  # the user's handle still knows its hook
    model(torch.randn(3, 8))
    assert len(calls) == 1
    half, _ = replace_linear(mlp(8, 8).half(), num_blocks=2, progress=False)
    assert half[0].weight.dtype == torch.float16


def test_shared_layers_and_weights_stay_shared():
    model = mlp(8, 8, 8, 8)
    model.append(model[0])
    model[4].weight = model[2].weight
    x = torch.randn(40, 8, dtype=torch.float64)
    for calibration in (None, [x]):
        new, report = replace_linear(model, num_blocks=2, calibration=calibration, progress=False)
        assert new[5] is new[0]
        assert new[4].weight is new[2].weight
        assert new[4].bias is not new[2].bias
        assert len(report.layers) == 3


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_are_rebound(optimizer, permute):
    """Training goes on as if the kept entries had been the only ones: state, gradients and groups carry over."""
    torch.manual_seed(2)
    arguments = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    model = mlp(8, 12, 8)
    x = torch.randn(20, 8, dtype=torch.float64)
    bound = optimizer(
        [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters()}], lr=0.01, **arguments
    )
    for _ in range(3):
        bound.zero_grad()
        model(x).square().sum().backward()
        bound.step()
    old, state = copy.deepcopy(model), [dict(bound.state[p]) for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    new, _ = replace_linear(model, num_blocks=2, permute=permute, optimizers=bound, inplace=True, progress=False)
    assert new is model
    assert [len(group["params"]) for group in bound.param_groups] == [2, 2]
    assert [p for group in bound.param_groups for p in group["params"]] == list(model.parameters())
    assert set(bound.state) == set(model.parameters())

    def dense(layer, blocks):
        """A tensor of the new layer's blocks where it was in the dense weight."""
        probe = copy.deepcopy(layer)
        probe.weight = nn.Parameter(blocks.detach().clone())
        return probe.to_dense().weight.detach()

    for index in (0, 2):
        kept = dense(model[index], torch.ones_like(model[index].weight)) != 0
        # Folded permutations cancel out between the two layers here: compare up to the order of hidden features.
        for name, value in bound.state[model[index].weight].items():
            before = state[index][name]
            if value.dim() == 0:
                assert torch.equal(value, before)
            elif not permute:
                assert torch.equal(dense(model[index], value), before * kept)
            else:
                assert set(value.flatten().tolist()) <= set(before.flatten().tolist())
        if not permute:
            assert torch.equal(dense(model[index], model[index].weight.grad), grads[index] * kept)
            assert torch.equal(dense(model[index], model[index].weight), old[index].weight * kept)
    torch.testing.assert_close(model(x), model(x))
    bound.zero_grad()
    model(x).square().sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    bound.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_named_parameters_of_optimizers():
    model = mlp(8, 8, 8)
    bound = torch.optim.Adam(model.named_parameters())
    replace_linear(model, "2", num_blocks=2, optimizers=[bound], inplace=True, progress=False)
    assert bound.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert bound.param_groups[0]["params"][2] is model[2].weight


def test_dry_run_and_report():
    model = mlp(8, 8, 4, dtype=torch.float32)
    before = copy.deepcopy(model)
    same, report = replace_linear(
        model, num_blocks=2, min_features=5, dry_run=True, inplace=True, measure=16, progress=False
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
    """Its fused inference path reads dense weights: it is not taken where they are none."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
    new, report = replace_linear(model, "*", num_blocks=4, progress=False)
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


def lazy(model):
    model[0] = nn.LazyLinear(8)


def on_meta(model):
    model[0] = nn.Linear(8, 8, device="meta")


def not_finite(model):
    model[2].weight.data[1, 1] = torch.nan


def pruned(model):
    prune.l1_unstructured(model[0], "weight", 0.5)


def normalised(model):
    parametrizations.weight_norm(model[0])


def hooked(model):
    model[0].weight.register_hook(lambda grad: grad)


def tied_to_embedding(model):
    embedding = nn.Embedding(8, 8, dtype=torch.float64)
    embedding.weight = model[0].weight
    model.append(embedding)


def converted(model):
    replace_linear(model, num_blocks=2, inplace=True, progress=False)


def quantized(model):
    model[0] = torch.ao.nn.quantized.dynamic.Linear(8, 8)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lazy, {}, "'0' is lazy"),
        (on_meta, {}, "'0' is on the meta device"),
        (not_finite, {}, "'2.weight' has NaN or infinite values"),
        (pruned, {}, r"'0' has parameters \['bias', 'weight_orig'\] in place of weight and bias"),
        (normalised, {}, "'0' is parametrized"),
        (hooked, {}, "'0.weight' has hooks of its own"),
        (tied_to_embedding, {}, "'0' shares a parameter with '5.weight'"),
        (converted, {}, r"matches no layer that could be converted; converted already: \['0', '2', '4'\]"),
        (quantized, {}, "'0' is quantized"),
        (None, {"num_blocks": 3}, r"'0' \(in_features=8, out_features=8\) cannot be split into 3 equal blocks"),
        (None, {"num_blocks": None, "parameter_budget": 0.01}, "no number of equal blocks keeps it within a budget"),
        (None, {"parameter_budget": 0.5}, "expected either num_blocks or parameter_budget, but got both"),
        (None, {"num_blocks": None}, "neither num_blocks nor parameter_budget nor the policy says how to split '0'"),
        (None, {"policy": "decoder.*"}, r"the policy's 'decoder.\*' matches no layer"),
        (None, {"policy": ["0", "1"]}, "the policy's '1' matches no layer"),
        (None, {"policy": lambda name, layer: False}, "the policy matches no layer"),
        (None, {"calibration": [torch.randn(4, 7, dtype=torch.float64)]}, "the model failed on calibration batch 0"),
        (None, {"calibration": []}, "at least one batch, but got none"),
        (None, {"calibration": [torch.full((4, 8), torch.nan, dtype=torch.float64)]}, "inputs of '0' have NaN"),
        (None, {"calibration": lambda model: None}, "never reached '0'"),
        (None, {"inplace": False}, "pass inplace=True"),
        (None, {"optimizers": torch.optim.SGD([nn.Parameter(torch.zeros(2))])}, "hold no parameter of the model"),
    ],
)  # fmt: skip
def test_bad_input_changes_nothing(damage, arguments, message):
    torch.manual_seed(0)
    model = mlp(8, 8, 8, 8)
    if damage is not None:
        damage(model)
    bound = torch.optim.Adam([p for p in model.parameters() if not p.is_meta and not nn.parameter.is_lazy(p)])
    modules, groups = list(model.modules()), copy.copy(bound.param_groups[0]["params"])
    modes = [module.training for module in modules]
    hooks = [len(module._forward_pre_hooks) for module in modules]
    values = [p.detach().clone() for p in groups]
    arguments = {"policy": "*", "num_blocks": 2, "inplace": True, "optimizers": bound, **arguments}
    with pytest.raises(ValueError, match=message):
        replace_linear(model, progress=False, **arguments)
    assert list(model.modules()) == modules
    assert [module.training for module in modules] == modes
    assert all(a is b for a, b in zip(bound.param_groups[0]["params"], groups, strict=True))
    for parameter, value in zip(groups, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0, equal_nan=True)
    assert [len(module._forward_pre_hooks) for module in modules] == hooks


def test_nothing_to_convert():
    """A warning, and a copy all the same."""
    model = mlp(8, 8)
    with pytest.warns(UserWarning, match="nothing was converted: .*fewer than 9 features"):
        new, report = replace_linear(model, num_blocks=2, min_features=9, progress=False)
    assert new is not model
    assert type(new[0]) is nn.Linear
    assert not report.layers


@pytest.mark.parametrize(
    ("answer", "converted"),
    [(True, True), (False, False), (None, False), (torch.tensor(True), True), (np.False_, False), (np.int64(2), True)],
    ids=repr,
)
def test_what_a_policy_may_return(answer, converted):
    model = mlp(8, 8, 8)
    new, _ = replace_linear(model, lambda name, _: answer if name == "0" else 4, num_blocks=2, progress=False)
    assert isinstance(new[0], BlockDiagLinear) == converted
    for wrong in (2.5, "yes"):
        with pytest.raises(TypeError, match="expected the policy to return a bool, an int or None for '0', but got"):
            replace_linear(model, lambda name, _, wrong=wrong: wrong, num_blocks=2)


class UsedAsList(nn.Module):
    """An nn.Sequential that is never called itself: what it looks like is not what is computed."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(hidden_blocks(4, 32, 32, True), nn.ReLU(), hidden_blocks(4, 32, 32, True))

    def forward(self, x):
        hidden = self.layers[0](x)
        return self.layers[2](self.layers[1](hidden)) + hidden


def test_permutations_are_not_folded_into_what_only_looks_like_a_chain():
    model, x = UsedAsList(), torch.randn(20, 32, dtype=torch.float64)
    new, _ = replace_linear(model, num_blocks=4, permute=True, progress=False)
    torch.testing.assert_close(new(x), model(x))


def test_reported_errors_are_those_of_the_stored_blocks():
    model = mlp(16, 16, dtype=torch.float32).bfloat16()
    x = torch.randn(100, 16).bfloat16()
    model[0].weight.data = torch.block_diag(*torch.randn(4, 4, 4)).bfloat16()
    new, report = replace_linear(model, num_blocks=4, calibration=[x[:8].repeat(10, 1)], progress=False)
    difference = new[0].to_dense().weight.double() - model[0].weight.double()
    outputs = x[:8].double() @ model[0].weight.double().T
    shift = (new[0].bias - model[0].bias).double()
    actual = (x[:8].double() @ difference.T + shift).norm() / outputs.norm()
    assert report.layers[0].error == pytest.approx(actual.item(), abs=2e-3)


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    _, report = replace_linear(model, num_blocks=4, progress=False)
    assert report.total("cost_before").parameters == 64 * 64
    assert report.total("cost_after").parameters == 64 * 16
    assert report.total("cost_after").operations == 2 * 2 * 64 * 16


def test_hooks_do_not_see_measurements():
    model, calls = mlp(8, 8), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    replace_linear(model, num_blocks=2, measure=4, dry_run=True, progress=False)
    assert not calls


def test_a_compiled_model_is_calibrated():
    model = torch.compile(mlp(8, 8), backend="eager")
    x = torch.randn(40, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    new, report = replace_linear(model, num_blocks=2, calibration=[x], progress=False)
    assert report.layers[0].calibrated
    assert new(x).shape == (40, 8)


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.SGD], ids=["factored", "fused"])
def test_optimizers_with_state_that_does_not_map(optimizer):
    arguments = {"momentum": 0.9, "fused": True} if optimizer is torch.optim.SGD else {}
    for convert in (
        lambda model, bound: replace_linear(model, "0", num_blocks=2, optimizers=bound, inplace=True, progress=False),
        lambda model, bound: factorize(model, "0", min_features=0, optimizers=bound, inplace=True, progress=False),
    ):
        model = mlp(8, 8, 8, dtype=torch.float32)
        bound = optimizer(model.parameters(), lr=1e-2, **arguments)
        for step in range(4):
            bound.zero_grad()
            model(torch.randn(5, 8)).square().sum().backward()
            bound.step()
            if step == 1:
                convert(model, bound)
                before = [p.detach().clone() for p in model.parameters()]
        assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_optimizers_that_keep_parameters_elsewhere_are_refused():
    model = mlp(8, 8)
    with pytest.raises(ValueError, match="LBFGS keeps parameters in its _params too"):
        replace_linear(model, num_blocks=2, inplace=True, optimizers=torch.optim.LBFGS(model.parameters()))
    assert type(model[0]) is nn.Linear
    muon = torch.optim.Muon([model[0].weight])
    with pytest.raises(ValueError, match="Muon takes matrices only"):
        replace_linear(model, num_blocks=2, inplace=True, optimizers=muon, progress=False)
    assert type(model[0]) is nn.Linear


def test_the_model_itself_is_no_layer_of_a_model():
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        replace_linear(nn.Linear(4, 4), num_blocks=2)


def test_a_layer_under_two_names_is_treated_as_one():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = model["a"]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are one layer, but the policy treats them differently"):
        replace_linear(model, "a", num_blocks=2)
    model["c"].weight = model["a"].weight
    with pytest.raises(ValueError, match="'a' and 'c' share a weight, but the policy treats them differently"):
        replace_linear(model, {"a": 2, "b": 2, "c": 4})


def test_interrupted_work_changes_nothing(monkeypatch):
    model = mlp(8, 8, 8)
    bound = torch.optim.Adam(model.parameters())
    modules, parameters = list(model), list(model.parameters())

    def interrupt(*_):
        raise KeyboardInterrupt

    for where in ("projection.diagonal_blocks", "convert.commit"):
        with monkeypatch.context() as patch:
            patch.setattr(f"blockdiag.conversion.{where}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                replace_linear(model, num_blocks=2, inplace=True, optimizers=bound, progress=False)
    # In the middle of replacing, after the optimizer and the first layer.
    add_module, calls = nn.Sequential.add_module, []

    def add_one(self, name, module):
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add_module(self, name, module)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Sequential, "add_module", add_one)
        with pytest.raises(KeyboardInterrupt):
            replace_linear(model, num_blocks=2, inplace=True, optimizers=bound, progress=False)
    assert calls == ["0", "2", "2", "0"]
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert all(a is b for a, b in zip(bound.param_groups[0]["params"], parameters, strict=True))
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    bound.step()


def test_missing_scipy_is_told_of(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match="pip install scipy scikit-learn"):
        replace_linear(mlp(4, 4), num_blocks=2, permute=True, progress=False)


def test_few_calibration_rows_are_warned_of():
    with pytest.warns(UserWarning, match="'0' has 8 inputs, but was calibrated on only 5 rows"):
        replace_linear(mlp(8, 8), num_blocks=2, calibration=[torch.randn(5, 8, dtype=torch.float64)], progress=False)
