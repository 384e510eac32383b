"""Replaced forwards, and parameters tied by aliasing, are rejected wherever they would be lost."""

import dataclasses
import functools
import types
from typing import NamedTuple

import pytest
import torch
from test_left_alone import Conv1D
from torch import nn
from torch.nn.utils import parametrizations, prune
from unchanged import unchanged

from blockdiag import (
    BlockDiagLinear,
    BlockDiagonal,
    LowRank,
    PermutedBlockDiagLinear,
    compress,
    split_attention,
    stack_models,
)
from blockdiag.integrations.transformers import conv1d_to_linear
from models import mlp


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Named(nn.Linear):
    """Another class with the same forward."""


def by_lambda(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def by_method(layer):
    layer.forward = types.MethodType(lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias), layer)


def by_accelerate(layer):
    """Replaces the forward as accelerate's hooks do."""
    layer._old_forward = layer.forward
    layer.forward = functools.update_wrapper(
        functools.partial(lambda module, x: 2 * module._old_forward(x), layer), layer._old_forward
    )


def by_hook(layer):
    layer.register_forward_hook(lambda module, args, output: 2 * output)


REPLACED = [by_lambda, by_method, by_accelerate]


def linear(change):
    layer = nn.Linear(8, 8)
    change(layer)
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *((functools.partial(linear, change), "has a forward of its own, which would be lost") for change in REPLACED),
        (functools.partial(linear, by_hook), "has hooks, which would be lost"),
        (lambda: Doubled(8, 8), r"is a test_refused\.Doubled, which may compute something else"),
        (lambda: Called(8, 8), "is a Called with a __call__ of its own"),
        (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "has hooks"),
    ],
)
def test_layers_that_compute_something_else(make, message):
    layer, other = make(), nn.Linear(8, 8)
    with unchanged(layer):
        for convert in (
            lambda: BlockDiagLinear.from_linears([other, layer]),
            lambda: BlockDiagLinear.from_linears([layer]),
            lambda: BlockDiagLinear.from_dense(layer, 2),
        ):
            with pytest.raises(ValueError, match=rf"BlockDiagLinear\.from_.*{message}"):
                convert()


def test_layers_that_compute_what_their_weight_says():
    x = torch.randn(3, 8)
    for layer in (Named(8, 8), parametrizations.weight_norm(nn.Linear(8, 8))):
        torch.testing.assert_close(BlockDiagLinear.from_dense(layer, 1)(x), layer(x))
        torch.testing.assert_close(BlockDiagLinear.from_linears([layer])(x), layer(x))
    layer = BlockDiagLinear(8, 8, 2)
    by_lambda(layer)
    for back in (layer.to_dense, layer.to_linears):
        with pytest.raises(ValueError, match="BlockDiagLinear: has a forward of its own"):
            back()


@pytest.mark.parametrize("change", REPLACED)
@pytest.mark.parametrize("where", ["0", "1", ""])
def test_models_that_compute_something_else_are_not_stacked(change, where):
    models = [mlp(8, 8, 8) for _ in range(3)]
    change(models[1].get_submodule(where))
    x = torch.randn(2, 8, dtype=torch.float64)
    for example in (None, x):
        with pytest.raises(ValueError, match=f"stack_models: '{where}' has a forward of its own"):
            stack_models(models, example)


def test_other_parts_of_stacked_models():
    class Reversed(nn.Flatten):
        def forward(self, x):
            return super().forward(x).flip(-1)

    with pytest.raises(ValueError, match="'0' is a Reversed, which cannot be stacked"):
        stack_models([nn.Sequential(Reversed(), nn.Linear(8, 8)) for _ in range(2)])
    models = [mlp(8, 8) for _ in range(2)]
    by_hook(models[1][0])
    with pytest.raises(ValueError, match="'0' has hooks"):
        stack_models(models)


@pytest.mark.parametrize("change", REPLACED)
def test_replaced_forwards_of_layers_to_convert(change):
    model = mlp(8, 8, 8)
    change(model[0])
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    change(attention[0])
    conv = nn.Sequential(Conv1D(8))
    change(conv[0])
    factored = compress(mlp(8, 8), LowRank(min_features=0), progress=False)[0]
    change(factored[0].down)
    for convert, given, name in (
        (lambda m: compress(m, BlockDiagonal(2), inplace=True, progress=False), model, "0"),
        (lambda m: compress(m, LowRank(min_features=0), inplace=True, progress=False), model, "0"),
        (lambda m: compress(m, LowRank(rank=1), inplace=True, progress=False), factored, "0.down"),
        (lambda m: split_attention(m, inplace=True), attention, "0"),
        (lambda m: conv1d_to_linear(m, inplace=True), conv, "0"),
    ):
        with unchanged(given), pytest.raises(ValueError, match=f"'{name}' has a forward of its own"):
            convert(given)


@pytest.mark.parametrize("by", ["forward", "hook"])
def test_no_permutation_is_folded_through_a_replaced_forward(by):
    """Of an activation, here by one for which the order of the features matters."""
    model = mlp(8, 8, 8)
    if by == "hook":
        model[1].register_forward_hook(lambda module, args, output: torch.cumsum(args[0], -1))
    else:
        model[1].forward = functools.partial(torch.cumsum, dim=-1)
    x = torch.randn(4, 8, dtype=torch.float64)
    new, _ = compress(model, BlockDiagonal(2, permute=True), progress=False)
    assert new[0].output_permutation is not None
    hidden = torch.cumsum(new[0](x), -1)
    torch.testing.assert_close(new(x), new[2](hidden))


def test_a_forward_that_holds_the_model_is_not_copied():
    """A copy would keep calling the layers of the original model."""
    model = nn.Sequential(mlp(8, 8), nn.Linear(8, 8).double())
    by_lambda(model[0])
    with unchanged(model), pytest.raises(ValueError, match="'0' has a forward of its own that calls the model's"):
        compress(model, BlockDiagonal(2), "1", progress=False)
    x = torch.randn(3, 8, dtype=torch.float64)
    with unchanged(model), pytest.raises(ValueError, match="calibration runs a copy of the model"):
        compress(model, BlockDiagonal(2), "1", calibration=[x], inplace=True, progress=False)
    compress(model, BlockDiagonal(2, permute=True), "1", inplace=True, progress=False)
    torch.testing.assert_close(model(x), model[1](2 * model[0][0](x)))


def tied():
    model = mlp(8, 8, 8, bias=False)
    model[2].weight = nn.Parameter(model[0].weight.data)
    return model


def transposed():
    model = mlp(8, 8, 8, bias=False)
    model[2].weight = nn.Parameter(model[0].weight.data.T)
    return model


def buffered():
    model = mlp(8, 8, bias=False)
    model.register_buffer("view", model[0].weight.data[1:])
    return model


def attached():
    model = mlp(8, 8, bias=False)
    model.view = model[0].weight.detach()
    return model


@pytest.mark.parametrize("make", [tied, transposed, buffered, attached])
@pytest.mark.parametrize("inplace", [True, False])
def test_weights_tied_by_their_memory(make, inplace):
    model = make()
    for convert in (
        lambda: compress(model, BlockDiagonal(2), "0", inplace=inplace, progress=False),
        lambda: compress(model, BlockDiagonal(2), inplace=inplace, progress=False),
        lambda: compress(model, LowRank(min_features=0), inplace=inplace, progress=False),
    ):
        with unchanged(model), pytest.raises(ValueError, match="share memory without being one Parameter"):
            convert()
    if make in (tied, transposed):
        with pytest.raises(ValueError, match=r"stack_models: '0.weight' and '2.weight' share memory"):
            stack_models([model, make()])


def test_ties_elsewhere_stay_in_a_copy():
    model = nn.Sequential(*tied(), nn.Linear(8, 8, dtype=torch.float64))
    model[2].weight.requires_grad_(False)
    new, _ = compress(model, BlockDiagonal(2, permute=True), "3", progress=False)
    assert new[0].weight.data_ptr() == new[2].weight.data_ptr() != model[0].weight.data_ptr()
    assert [p.requires_grad for p in new.parameters()] == [True, False, True, True]
    assert new[3].input_permutation is not None  # nothing is folded into tied parameters
    torch.testing.assert_close(new[0].weight, model[0].weight)


def test_slices_of_one_memory_are_not_tied():
    """For example, flattened parameters, and columns of one matrix."""
    flat, wide = torch.randn(128, dtype=torch.float64), torch.randn(8, 16, dtype=torch.float64)
    for slices in ((flat[:64].view(8, 8), flat[64:].view(8, 8)), (wide[:, :8], wide[:, 8:])):
        model = mlp(8, 8, 8, bias=False)
        model[0].weight, model[2].weight = (nn.Parameter(part) for part in slices)
        new, _ = compress(model, BlockDiagonal(2), progress=False)
        assert type(new[2]) is BlockDiagLinear


def test_pruned_attention_and_hooks_inside_layers():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    prune.l1_unstructured(model[0], "in_proj_weight", 0.5)
    with pytest.raises(ValueError, match=r"'0' has parameters \['in_proj_weight_orig'\] of pruning"):
        split_attention(model)
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    parametrizations.weight_norm(model[0].out_proj)
    with pytest.raises(ValueError, match=r"'0.out_proj' is parametrized"):
        split_attention(model)
    factored = compress(mlp(8, 8), LowRank(min_features=0), progress=False)[0]
    by_hook(factored[0].up)
    with pytest.raises(ValueError, match=r"'0.up' has hooks, which would be lost"):
        compress(factored, LowRank(rank=1), progress=False)


# ---- nothing is folded through code that a trace cannot see


class Asks(nn.Module):
    """Scales the features if a query has the answer that it has for tensors."""

    def __init__(self, question):
        super().__init__()
        self.up, self.down, self.question = nn.Linear(8, 12), nn.Linear(12, 4), question
        self.register_buffer("gain", torch.arange(12.0))

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x):
        hidden = self.up(x).relu()
        if self.question == "isinstance" and isinstance(hidden, torch.Tensor):
            hidden = hidden * self.gain
        if self.question == "device" and self.device.type == "cpu":
            hidden = hidden * self.gain
        if self.question == "grad" and torch.is_grad_enabled():
            hidden = hidden * self.gain
        return self.down(hidden)


@pytest.mark.parametrize("question", ["isinstance", "device", "grad"])
def test_nothing_is_folded_where_a_forward_asks(question):
    model, x = Asks(question), torch.randn(5, 8)
    new, _ = compress(model, BlockDiagonal(2, permute=True), "down", progress=False)
    assert new.down.input_permutation is not None
    assert torch.equal(new.up.weight, model.up.weight)
    with torch.no_grad():
        hidden = model.up(x).relu() * (1 if question == "grad" else model.gain)
        torch.testing.assert_close(new(x), new.down(hidden))


class Pair(NamedTuple):
    hidden: torch.Tensor
    count: int


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor


class Encoder(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.up, self.wrap = nn.Linear(8, 12), wrap

    def forward(self, x):
        return self.wrap(self.up(x).relu())


class Whole(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.encoder, self.down = Encoder(wrap), nn.Linear(12, 4)

    def forward(self, x):
        return self.down(self.encoder(x).hidden)


@pytest.mark.parametrize("wrap", [functools.partial(Pair, count=1), Result], ids=["namedtuple", "dataclass"])
def test_nothing_is_folded_past_a_hook_that_sees_the_features_in_an_object(wrap):
    model, x = Whole(wrap), torch.randn(5, 8)
    model.encoder.register_forward_hook(lambda module, args, output: wrap(output.hidden * torch.arange(12.0)))
    new, _ = compress(model, BlockDiagonal(2, permute=True), "down", progress=False)
    assert torch.equal(new.encoder.up.weight, model.encoder.up.weight)
    torch.testing.assert_close(new(x), new.down(model.encoder(x).hidden))


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_nothing_is_folded_into_a_layer_with_a_mask(kind):
    """The mask would keep the old order."""
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    mask = (torch.rand(12, 1) > 0.5).float()
    if kind == "buffer":
        model[0].register_buffer("mask", mask)
    else:
        model[0].mask = mask
    before = model[0].weight.clone()
    new, _ = compress(model, BlockDiagonal(2, permute=True), "2", progress=False)
    assert torch.equal(new[0].weight, before)
    assert new[2].input_permutation is not None


class DoubledBlocks(BlockDiagLinear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", [by_lambda, by_method, by_hook])
def test_blocks_with_another_forward_do_not_become_dense(change):
    layer = BlockDiagLinear(8, 4, 2)
    change(layer)
    permuted = PermutedBlockDiagLinear(4, 4, 2, [1, 0, 3, 2])
    change(permuted)
    for convert in (layer.to_dense, layer.to_linears, DoubledBlocks(8, 4, 2).to_dense, permuted.to_dense):
        with pytest.raises(ValueError, match=r"would be lost|may compute something else"):
            convert()


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8))
    new, _ = compress(model, BlockDiagonal(2), progress=False)
    assert new[0].weight.shape == (2, 4, 4)
