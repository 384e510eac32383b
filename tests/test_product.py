"""The weight of a layer of factors, which is multiplied out when it is used."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockdiag import LowRankConv, LowRankLinear, MonarchLinear, factorize

LAYERS = {
    "low rank": lambda: LowRankLinear(12, 8, 3),
    "monarch": lambda: MonarchLinear(12, 8, (3, 4), rank=2),
    "convolution": lambda: LowRankConv(nn.Conv2d(4, 6, 3, groups=2), 2),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@every_layer
def test_what_is_known_costs_nothing(make):
    layer = make()
    dense = layer._multiplied()

    def known(weight):
        assert isinstance(weight, torch.Tensor)
        assert not isinstance(weight, nn.Parameter)
        names = ("device", "dtype", "is_cuda", "is_meta", "layout", "ndim", "requires_grad", "shape", "nbytes")
        methods = ("dim", "numel", "size", "stride", "is_contiguous", "is_floating_point", "element_size", "__len__")
        return [getattr(weight, n) for n in names], [getattr(weight, n)() for n in methods], torch.is_complex(weight)

    assert flops(lambda: known(layer.weight)) == 0
    assert known(layer.weight) == known(dense)
    with torch.no_grad():
        assert known(layer.weight) == known(layer._multiplied())
    layer.double()
    assert layer.weight.dtype == torch.float64
    assert layer.to("meta").weight.is_meta


@every_layer
def test_what_computes_has_the_values_and_the_gradients(make):
    layer = make()
    dense = layer._multiplied()
    assert flops(lambda: layer.weight + 0) > 0
    for function in (
        lambda w: w.sum(1),
        lambda w: torch.cat([w, w]),
        lambda w: nn.functional.linear(torch.ones(5, w.shape[-1]), w.flatten(1)[:, : w.shape[-1]]),
        lambda w: w[2:4].T.clone(),
        lambda w: w.detach(),
        lambda w: torch.equal(w, dense) and w.tolist() == dense.tolist() and repr(w) == repr(dense),
        lambda w: w.detach().numpy().sum(),
        lambda w: copy.deepcopy(w.detach()),
        lambda w: pickle.loads(pickle.dumps(w.detach())),
        lambda w: torch.empty_like(w).copy_(w),
        lambda w: torch.vmap(lambda row: row * 2)(w.clone()),
        lambda w: torch.vmap(lambda row: row * 2)(w.detach()),
        lambda w: torch.vmap(lambda x: (x * w).sum())(torch.ones(3)),
        lambda w: torch.func.grad(lambda x: (x * w).sum())(torch.ones_like(w)),
    ):
        actual, expected = function(layer.weight), function(dense)
        torch.testing.assert_close(actual, expected)
        assert type(actual) is type(expected)
    grads = [
        torch.autograd.grad(w.sin().sum(), [*layer.parameters()], allow_unused=True) for w in (layer.weight, dense)
    ]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        assert not layer.weight.sin().requires_grad
        weight = layer.weight
    assert not weight.sin().requires_grad  # as when it was read


@every_layer
def test_has_the_values_of_when_it_was_read(make):
    layer = make()
    before, expected = layer.weight, layer._multiplied()
    layer.reset_parameters()
    torch.testing.assert_close(before, expected)
    before = layer.weight
    with torch.no_grad():
        next(layer.parameters()).mul_(2)
    assert before.shape == expected.shape
    with pytest.raises(RuntimeError, match="as they were when it was read, but they were changed since"):
        before.sum()
    torch.testing.assert_close(layer.weight, layer._multiplied())


def test_a_gradient_is_never_lost():
    """Where torch computes with a tensor without asking for its ``__torch_function__``."""
    weight = LowRankLinear(12, 8, 3).weight
    with pytest.raises(RuntimeError, match=r"would miss the gradient of a weight's factors: .clone"):
        torch.vmap(lambda row: row * 2)(weight)
    with torch._C.DisableTorchFunctionSubclass():
        with pytest.raises(RuntimeError, match="would miss the gradient of a weight's factors"):
            weight.sum()
        torch.testing.assert_close(LowRankLinear(12, 8, 3).requires_grad_(False).weight.sum().shape, torch.Size([]))


@pytest.mark.parametrize("mode", ["inference", "autocast", "compile", "trace", "script", "functional_call"])
def test_other_modes(mode):
    layer, x = LowRankLinear(12, 8, 3), torch.randn(5, 12)

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return nn.functional.linear(x.to(self.layer.weight.dtype), self.layer.weight)

    expected = nn.functional.linear(x, layer._multiplied())
    if mode == "inference":
        with torch.inference_mode():
            torch.testing.assert_close(Reads()(x), expected)
            torch.testing.assert_close(Reads()(x), nn.functional.linear(x, LowRankLinear.weight.fget(layer)))
    elif mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.weight.dtype == Reads()(x).dtype == torch.bfloat16
    elif mode == "compile":
        compiled = torch.compile(Reads(), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(Reads(), (x,)).module()(x), expected)
    elif mode == "trace":
        torch.testing.assert_close(torch.jit.trace(Reads(), x)(x), expected)
    elif mode == "script":
        torch.testing.assert_close(torch.jit.script(Reads())(x), expected)
    else:
        doubled = {name: 2 * parameter for name, parameter in Reads().named_parameters()}
        torch.testing.assert_close(torch.func.functional_call(Reads(), doubled, (x,)), 4 * expected)


class FeedForward(nn.Module):
    """Reads its last layer's weight in every forward pass, as transformers' T5 does (transformers#36254)."""

    def __init__(self):
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        hidden = self.wi(x).relu()
        if (
            isinstance(self.wo.weight, torch.Tensor)
            and hidden.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8
        ):
            hidden = hidden.to(self.wo.weight.dtype)
        return self.wo(hidden)


@pytest.mark.parametrize("options", [{"latent_features": 4}, {"method": "monarch"}], ids=str)
def test_a_model_that_reads_a_weight_saves_what_the_report_says(options):
    dense, x = nn.Sequential(FeedForward()), torch.randn(3, 16)
    model, report = factorize(dense, "*.wo", **options, min_features=1, progress=False)
    saved = flops(lambda: dense(x)) - flops(lambda: model(x))
    assert saved == 3 * 2 * (64 * 16 - sum(p.numel() for p in model[0].wo.parameters() if p.dim() > 1))
    assert report.total("cost_before").operations > report.total("cost_after").operations
