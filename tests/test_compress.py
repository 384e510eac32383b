"""compress carries over hooks, sharing and optimizers; bad input, or an interruption, changes nothing."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from blockdiag import BlockDiagLinear, BlockDiagonal, LowRank, compress
from blockdiag.compression.numerics import projection
from models import mlp


def test_what_carries_over():
    model = mlp(8, 8, 8, dtype=torch.float32).eval()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    calls = []
    handle = model[0].register_forward_hook(lambda module, *_: calls.append(type(module)))
    compress(model, BlockDiagonal(2), inplace=True, progress=False)
    assert not model[0].training
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, False]
    model(torch.randn(3, 8))
    assert calls == [BlockDiagLinear]
    handle.remove()  # the user's handle still removes its hook
    model(torch.randn(3, 8))
    assert len(calls) == 1
    half, _ = compress(mlp(8, 8).half(), BlockDiagonal(2), progress=False)
    assert half[0].weight.dtype == torch.float16


def test_shared_layers_and_weights_stay_shared():
    model = mlp(8, 8, 8, 8)
    model.append(model[0])
    model[4].weight = model[2].weight
    x = torch.randn(40, 8, dtype=torch.float64)
    for calibration in (None, [x]):
        new, report = compress(model, BlockDiagonal(2), calibration=calibration, progress=False)
        assert new[5] is new[0]
        assert new[4].weight is new[2].weight
        assert new[4].bias is not new[2].bias
        assert len(report.layers) == 3


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_optimizers_are_rebound(optimizer, permute):
    """Training continues as if only the kept entries had existed: state, gradients and groups carry over."""
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
    new, _ = compress(model, BlockDiagonal(2, permute=permute), optimizers=bound, inplace=True, progress=False)
    assert new is model
    assert [len(group["params"]) for group in bound.param_groups] == [2, 2]
    assert [p for group in bound.param_groups for p in group["params"]] == list(model.parameters())
    assert set(bound.state) == set(model.parameters())

    def dense(layer, blocks):
        """Scatters the new layer's blocks to their places in the dense weight."""
        probe = copy.deepcopy(layer)
        getattr(probe, "blocks", probe).weight = nn.Parameter(blocks.detach().clone())
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
    compress(model, BlockDiagonal(2), "2", optimizers=[bound], inplace=True, progress=False)
    assert bound.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert bound.param_groups[0]["params"][2] is model[2].weight


def lazy(model):
    model[0] = nn.LazyLinear(8)


def on_meta(model):
    model[0] = nn.Linear(8, 8, device="meta")


def not_finite(model):
    model[2].weight.data[1, 1] = torch.nan


def pruned(model):
    prune.l1_unstructured(model[0], "weight", 0.5)


def normalized(model):
    parametrizations.weight_norm(model[0])


def hooked(model):
    model[0].weight.register_hook(lambda grad: grad)


def tied_to_embedding(model):
    embedding = nn.Embedding(8, 8, dtype=torch.float64)
    embedding.weight = model[0].weight
    model.append(embedding)


def converted(model):
    compress(model, BlockDiagonal(2), inplace=True, progress=False)


def quantized(model):
    model[0] = torch.ao.nn.quantized.dynamic.Linear(8, 8)


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lazy, {}, "'0' is lazy"),
        (on_meta, {}, "'0' is on the meta device"),
        (not_finite, {}, "'2.weight' has NaN or infinite values"),
        (pruned, {}, r"'0' has parameters \['bias', 'weight_orig'\] in place of weight and bias"),
        (normalized, {}, "'0' is parametrized"),
        (hooked, {}, "'0.weight' has hooks of its own"),
        (tied_to_embedding, {}, "'0' shares a parameter with '5.weight'"),
        (converted, {}, r"matches no layer that could be compressed; compressed already: \['0', '2', '4'\]"),
        (quantized, {}, "'0' is quantized"),
        (None, {"config": BlockDiagonal(3)}, r"'0' \(in_features=8, out_features=8\) cannot be split into 3 equal"),
        (None, {"config": BlockDiagonal(), "budget": 0.01}, "no number of equal blocks keeps it within a budget"),
        (None, {"budget": 0.5}, "expected either num_blocks or budget, but got both"),
        (None, {"config": BlockDiagonal()}, "expected either num_blocks or budget, but got neither"),
        (None, {"layers": "decoder.*"}, r"the pattern 'decoder.\*' matches no layer that could be compressed"),
        (None, {"layers": ["0", "1"]}, "the pattern '1' matches no layer that could be compressed; '1' is a ReLU"),
        (None, {"layers": lambda name, layer: False}, "the choice of layers matches no layer"),
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
    arguments = {"config": BlockDiagonal(2), "inplace": True, "optimizers": bound, **arguments}
    with pytest.raises(ValueError, match=message):
        compress(model, progress=False, **arguments)
    assert list(model.modules()) == modules
    assert [module.training for module in modules] == modes
    assert all(a is b for a, b in zip(bound.param_groups[0]["params"], groups, strict=True))
    for parameter, value in zip(groups, values, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0, equal_nan=True)
    assert [len(module._forward_pre_hooks) for module in modules] == hooks


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.SGD], ids=["factored", "fused"])
def test_optimizers_with_state_that_does_not_map(optimizer):
    arguments = {"momentum": 0.9, "fused": True} if optimizer is torch.optim.SGD else {}
    for convert in (
        lambda model, bound: compress(model, BlockDiagonal(2), "0", optimizers=bound, inplace=True, progress=False),
        lambda model, bound: compress(
            model, LowRank(min_features=0), "0", optimizers=bound, inplace=True, progress=False
        ),
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
        compress(model, BlockDiagonal(2), inplace=True, optimizers=torch.optim.LBFGS(model.parameters()))
    assert type(model[0]) is nn.Linear
    muon = torch.optim.Muon([model[0].weight])
    with pytest.raises(ValueError, match="Muon takes matrices only"):
        compress(model, BlockDiagonal(2), inplace=True, optimizers=muon, progress=False)
    assert type(model[0]) is nn.Linear


def test_the_model_itself_is_not_replaced():
    with pytest.raises(ValueError, match=r"put it into an nn\.Sequential"):
        compress(nn.Linear(4, 4), BlockDiagonal(2))


def test_a_layer_under_two_names_is_treated_as_one():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"] = model["a"]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] are one layer, but get different configs"):
        compress(model, BlockDiagonal(2), "a")
    model["c"].weight = model["a"].weight
    with pytest.raises(ValueError, match="'a' and 'c' share a weight, but get different configs"):
        compress(model, {"a": BlockDiagonal(2), "b": BlockDiagonal(2), "c": BlockDiagonal(4)})


def test_interrupted_work_changes_nothing(monkeypatch):
    model = mlp(8, 8, 8)
    bound = torch.optim.Adam(model.parameters())
    modules, parameters = list(model), list(model.parameters())

    def interrupt(*_):
        raise KeyboardInterrupt

    for module, name in ((projection, "diagonal_blocks"), (sys.modules[compress.__module__], "commit")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                compress(model, BlockDiagonal(2), inplace=True, optimizers=bound, progress=False)
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
            compress(model, BlockDiagonal(2), inplace=True, optimizers=bound, progress=False)
    assert calls == ["0", "2", "2", "0"]
    assert all(a is b for a, b in zip(model, modules, strict=True))
    assert all(a is b for a, b in zip(bound.param_groups[0]["params"], parameters, strict=True))
    model(torch.randn(2, 8, dtype=torch.float64)).sum().backward()
    bound.step()


def test_hooks_do_not_see_measurements():
    model, calls = mlp(8, 8), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    compress(model, BlockDiagonal(2), measure=4, dry_run=True, progress=False)
    assert not calls


def test_a_compiled_model_is_calibrated():
    model = torch.compile(mlp(8, 8), backend="eager")
    x = torch.randn(40, 8, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    new, report = compress(model, BlockDiagonal(2), calibration=[x], progress=False)
    assert report.layers[0].calibrated
    assert new(x).shape == (40, 8)
