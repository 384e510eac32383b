"""Conversions run no user code on the user's model, and have no side effects unless they succeed in-place."""

import contextlib
import functools
import pickle
import random
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from unchanged import snapshot, unchanged

import blockdiag
from blockdiag import BlockDiagonal, LowRank, Monarch, compress, split_attention, stack_models
from blockdiag.integrations.transformers import conv1d_to_linear

CALLS = []


def note(*_):
    CALLS.append("hook")


class LoRA(nn.Linear):
    """Merges into its frozen weight in eval mode, as loralib's does."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.merged = False
        self.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, sizes[0])), nn.Parameter(torch.randn(sizes[1], 2))

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class Conv1D(nn.Module):
    __module__ = "transformers.pytorch_utils"

    def __init__(self, features):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(features, features)), nn.Parameter(torch.randn(features))

    def forward(self, x):
        return x @ self.weight + self.bias


class Everything(nn.Module):
    """A forward with every possible side effect, and layers for every conversion."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)
        self.lora, self.norm, self.conv = LoRA(16, 16), nn.BatchNorm1d(16), nn.Identity()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.factored = blockdiag.LowRankLinear(16, 16, 6)
        self.register_buffer("mean", torch.ones(16))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long), persistent=False)
        self.count, self.last, self.seen = 0, None, []

    def forward(self, x):
        self.count += 1
        self.updates += 1
        hidden = self.up(x) * torch.full((32,), 1.0)
        self.mean.mul_(0.9).add_(0.1 * x.mean(0).detach())
        self.last = hidden
        self.seen.append(hidden)
        self.down.bias.data.clamp_(-1, 1)
        x = self.down(F.relu(hidden)) + self.mean + torch.rand(16) + random.random() + np.random.rand()
        x = self.factored(self.conv(self.norm(self.lora(x))))
        x = self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]
        return self.head(x)


def make(name, training=True):
    torch.manual_seed(0)
    model = Everything()
    if name == "conv1d":  # cannot be pickled under its name
        model.conv = Conv1D(16)
    model.up.weight.no_weight_decay = True
    model.down.bias._optim = {"lr": 0.1}
    model(torch.randn(8, 16))  # keeps an activation with a graph, which Python's deepcopy rejects
    model.train(training)
    model.norm.eval()
    for module in (model, model.up, model.down, model.norm):
        module.register_forward_hook(note)
        module.register_forward_pre_hook(note)
    return model


def inputs():
    return [torch.randn(40, 16, generator=torch.Generator().manual_seed(1)) for _ in range(2)]


LAYERS = ["up", "down", "head"]
CONVERSIONS = {
    "replace": lambda m, **kw: compress(m, BlockDiagonal(4), LAYERS, measure=4, progress=False, **kw),
    "permute": lambda m, **kw: compress(m, BlockDiagonal(4, permute=True), ["up", "head"], progress=False, **kw),
    "calibrated": lambda m, **kw: compress(
        m, BlockDiagonal(4, permute=True), LAYERS, calibration=inputs(), measure=4, progress=False, **kw
    ),
    "low rank": lambda m, **kw: compress(m, LowRank(min_features=0), LAYERS, measure=4, progress=False, **kw),
    "monarch": lambda m, **kw: compress(m, Monarch(min_features=0), LAYERS, calibration=inputs(), progress=False, **kw),
    "lower": lambda m, **kw: compress(
        m, LowRank(rank=2), "factored", calibration=inputs(), measure=4, progress=False, **kw
    ),
}
EXCHANGES = {"attention": split_attention, "conv1d": conv1d_to_linear}


@pytest.fixture(autouse=True)
def looking_on():
    """Global hooks, which must observe nothing."""
    CALLS.clear()
    handles = [
        nn.modules.module.register_module_forward_hook(note),
        nn.modules.module.register_module_forward_pre_hook(note),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*CONVERSIONS, *EXCHANGES])
def test_a_copy_is_converted(name, training):
    model = make(name, training)
    CALLS.clear()
    with unchanged(model):
        result = CONVERSIONS[name](model)[0] if name in CONVERSIONS else EXCHANGES[name](model)
    assert not CALLS
    assert type(result) is Everything
    assert (result.count, len(result.seen), result.training) == (1, 1, training)
    assert not result.norm.training
    assert result.lora.merged == (not training)
    assert torch.equal(result.lora.weight, model.lora.weight)
    assert torch.equal(result.mean, model.mean)
    if name != "conv1d":
        pickle.dumps(result)
    assert not any(isinstance(value, torch.fx.Proxy) for part in result.modules() for value in vars(part).values())
    # Attributes of parameters carry over, whether or not the layer was converted.
    first = next(result.up.parameters())
    assert first.no_weight_decay
    assert [p._optim for p in result.down.parameters() if hasattr(p, "_optim")] == [{"lr": 0.1}]


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_dry_run(name):
    model = make(name)
    optimizer = torch.optim.Adam(model.parameters())
    CALLS.clear()
    with unchanged(model, optimizer):
        CONVERSIONS[name](model, dry_run=True, inplace=True, optimizers=optimizer)
    assert not CALLS


@pytest.mark.parametrize("name", [*CONVERSIONS, *EXCHANGES])
def test_in_place_only_what_is_named_changes(name):
    model = make(name)
    before = {part: snapshot(part)[0] for part in (model.lora, model.norm)}
    held = {key: vars(model)[key] for key in ("count", "last", "training")}
    mean, random_state = model.mean.clone(), snapshot()[1:]
    CALLS.clear()
    {**CONVERSIONS, **EXCHANGES}[name](model, inplace=True)
    assert not CALLS
    assert snapshot()[1:] == random_state
    assert all(snapshot(part)[0] == was for part, was in before.items())
    assert {key: vars(model)[key] for key in held} == held
    assert torch.equal(model.mean, mean)
    assert next(model.up.parameters()).no_weight_decay


class Interruption:
    """Raises once, in the n-th call of any of blockdiag's functions."""

    def __init__(self, after, error):
        self.left, self.error, self.folder = after, error, str(Path(blockdiag.__file__).parent)

    def __call__(self, frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(self.folder):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise self.error("interrupted")


def interrupted(convert, after, error):
    """Returns whether the conversion was interrupted."""
    try:
        sys.setprofile(Interruption(after, error))
        convert()
    except error:
        return True
    finally:
        sys.setprofile(None)
    return False


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", [*CONVERSIONS, *EXCHANGES])
def test_interrupted_anywhere(name, error):
    """At any point, the model is either unchanged or converted; mostly the former."""
    model = make(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 16)).sum().backward()
    optimizer.step()
    after, step, times = 1, 1, 0
    while True:
        before = snapshot(model, optimizer)
        with contextlib.suppress(ValueError):  # reports where calibration was interrupted
            if not interrupted(
                lambda: {**CONVERSIONS, **EXCHANGES}[name](model, inplace=True, optimizers=optimizer), after, error
            ):
                break
        assert snapshot(model, optimizer) == before
        times += 1
        after, step = after + step, step + step // 2 + 1
    assert times > 6


def test_stack_models_compares_copies():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last, self.count = nn.Linear(4, 4), None, 0

        def forward(self, x):
            self.count += 1
            self.last = self.layer(x) + 0 * torch.rand(4, dtype=x.dtype)
            return self.last

    models, x = [Drawing() for _ in range(3)], torch.randn(5, 4)
    models[0].layer.weight.no_weight_decay = True
    for model in models:
        model(x)
    CALLS.clear()
    with unchanged(*models):
        stacked = stack_models(models, x)
    assert not CALLS
    assert stacked.stacked.layer.weight.no_weight_decay
    assert all(model.layer.weight.no_weight_decay for model in stacked.to_models())
    torch.testing.assert_close(stacked(x), torch.stack([model(x) for model in models]))


def test_hooks_that_calibration_does_not_call_are_told_of():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    prune.l1_unstructured(model[2], "weight", 0.5)  # also a hook, but it computes the weight and must be called
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compress(model, BlockDiagonal(2), "0", calibration=inputs(), progress=False)
    model[1].register_forward_hook(note)
    with pytest.warns(UserWarning, match="calibration does not call the forward hooks of '1' and others"):
        compress(model, BlockDiagonal(2), "0", calibration=inputs(), progress=False)


def test_calibration_of_what_is_computed_beside_the_layers():
    """Calibration supports computed weights, replaced forwards that are copied, and compiled parts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    prune.l1_unstructured(model[0], "weight", 0.5)
    model[0].weight_orig.data *= 3  # no forward has run since
    model[1].forward = functools.partial(F.relu)
    compiled = torch.compile(model, backend="eager")
    x = inputs()[0]
    expected, _ = compress(nn.Sequential(model[2]), BlockDiagonal(2), calibration=[model[:2](x)], progress=False)
    for given, name in ((model, "2"), (compiled, "_orig_mod.2")):
        new, report = compress(given, BlockDiagonal(2), name, calibration=[x], progress=False)
        assert report.layers[0].calibrated
        torch.testing.assert_close(new.get_submodule(name).weight, expected[0].weight)


def test_attributes_that_cannot_be_copied_are_shared():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight.lock = threading.Lock()
    new, _ = compress(model, BlockDiagonal(2), "0", progress=False)
    assert new[1].weight.lock is model[1].weight.lock


def test_lazy_layers_stay_lazy():
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(4))
    compress(model, BlockDiagonal(2), "0", calibration=inputs(), inplace=True, progress=False)
    assert isinstance(model[1], nn.LazyLinear)
    assert model(inputs()[0]).shape == (40, 4)
