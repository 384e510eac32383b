"""Parameters that take over a permutation are changed in-place; optimizer state that does not map is dropped."""

import copy
import warnings

import pytest
import torch
from torch import nn
from unchanged import unchanged

from blockdiag import BlockDiagonal, LowRank, compress, split_attention
from models import mlp


def permuted(model, layers="0", **arguments):
    return compress(model, BlockDiagonal(2, permute=True), layers, inplace=True, progress=False, **arguments)[0]


@pytest.mark.parametrize("layers", ["0", "2"])
def test_a_neighbor_keeps_its_parameters(layers):
    """Identity, gradients, module hooks and requires_grad; every holder of the parameter keeps training it."""
    neighbor = 2 if layers == "0" else 0
    model = mlp(8, 8, 8)
    model[neighbor].weight.mask = torch.arange(64.0, dtype=torch.float64).view(8, 8)
    model[neighbor].bias.requires_grad_(False)
    x = torch.randn(5, 8, dtype=torch.float64)
    model(x).sum().backward()
    parameters, old = list(model[neighbor].parameters()), copy.deepcopy(model[neighbor])
    grad = parameters[0].grad
    before = grad.clone()
    outside = torch.optim.SGD([parameters[0]], lr=0.1)
    with pytest.warns(UserWarning, match=rf"\['{neighbor}.weight'\] took over permutations of neighbors"):
        permuted(model, layers)
    assert all(a is b for a, b in zip(model[neighbor].parameters(), parameters, strict=True))
    assert parameters[0].grad is grad
    assert not parameters[1].requires_grad
    weight = parameters[0].detach()
    assert not torch.equal(weight, old.weight)
    # Values, gradient and mask are permuted alike.
    where = torch.stack([(old.weight == value).nonzero()[0] for value in weight.flatten()])
    for tensor, was in ((grad, before), (parameters[0].mask, torch.arange(64.0, dtype=torch.float64).view(8, 8))):
        assert torch.equal(tensor.flatten(), was[where[:, 0], where[:, 1]])
    moved = weight.clone()
    model(x).sum().backward()
    outside.step()
    assert not torch.equal(parameters[0], moved)


def test_an_optimizer_that_is_handed_over_follows_the_neighbor():
    """Training continues as without the conversion: the moments are permuted too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[0].weight.data = torch.block_diag(*torch.randn(2, 4, 4).double())[torch.randperm(8)][:, torch.randperm(8)]
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    x = torch.randn(20, 8, dtype=torch.float64)
    optimizer = torch.optim.Adam([("head." + n, p) for n, p in model[2].named_parameters()], lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step(model, optimizer)
    other, head = copy.deepcopy(model), model[2].weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        permuted(model, optimizers=optimizer)
    assert model[2].weight is head
    assert optimizer.param_groups[0]["param_names"] == ["head.weight", "head.bias"]
    torch.testing.assert_close(model(x), other(x))
    twin = torch.optim.Adam(other[2].parameters(), lr=0.1)
    state = {
        id(new): optimizer.state[old] for new, old in zip(other[2].parameters(), model[2].parameters(), strict=True)
    }
    order = [int((other[2].weight == column[:, None]).all(0).nonzero()) for column in model[2].weight.T]
    for parameter in other[2].parameters():
        twin.state[parameter] = copy.deepcopy(state[id(parameter)])
        if parameter.dim() == 2:
            for name in ("exp_avg", "exp_avg_sq"):
                twin.state[parameter][name][:, order] = state[id(parameter)][name]
    for _ in range(3):
        step(model, optimizer)
        step(other, twin)
        torch.testing.assert_close(model(x), other(x))


def test_interrupted_while_a_neighbor_is_reordered(monkeypatch):
    model = mlp(8, 8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("rewrap", "carry_attributes"):
        with monkeypatch.context() as patch, unchanged(model, optimizer):
            patch.setattr(f"blockdiag._surgery.replacement.{name}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                permuted(model, optimizers=optimizer)


class Preconditioned(torch.optim.Optimizer):
    """As SOAP, Shampoo and PSGD: state for each dimension of a parameter, in different containers."""

    def __init__(self, params, keep):
        super().__init__(params, {"lr": 1e-3})
        self.keep = keep

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"], state["exp_avg"] = 0, torch.zeros_like(p)
                    self.write(state, [torch.eye(n, dtype=p.dtype) * 1e-3 for n in p.shape])
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 0.1)
                update = state["exp_avg"]
                factors = self.read(state, p.dim())
                assert len(factors) == p.dim()
                for dim, factor in enumerate(factors):
                    rows = p.grad.movedim(dim, 0).reshape(p.shape[dim], -1)
                    factor += rows @ rows.mT
                    values, vectors = torch.linalg.eigh(factor)
                    root = vectors @ torch.diag(values.clamp(min=1e-12).rsqrt()) @ vectors.mT
                    update = torch.tensordot(root, update, dims=([1], [dim])).movedim(0, dim)
                p.sub_(group["lr"] * update)

    def write(self, state, factors):
        if self.keep == "keys":
            state.update({f"factor_{dim}": factor for dim, factor in enumerate(factors)})
        elif self.keep == "dict":
            state["factors"] = dict(enumerate(factors))
        elif self.keep == "object":
            state["factors"] = Factors(factors)
        else:
            state["factors"] = tuple(factors) if self.keep == "tuple" else factors

    def read(self, state, dims):
        if self.keep == "keys":
            return [state[f"factor_{dim}"] for dim in range(dims)]
        factors = state["factors"]
        return list(factors.values() if self.keep == "dict" else getattr(factors, "factors", factors))


class Factors:
    def __init__(self, factors):
        self.factors = factors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keep", ["list", "tuple", "dict", "keys", "object"])
@pytest.mark.parametrize("convert", ["replace", "permute", "neighbor", "low rank", "lower", "attention"])
def test_optimizers_with_preconditioners(convert, keep, bias):
    """Square weights are the hardest case: a preconditioner has their shape, but does not hold values per entry."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias), nn.Tanh(), nn.Linear(8, 8, bias))
    if convert == "lower":
        model = compress(model, LowRank(rank=3, min_features=0), progress=False)[0]
    if convert == "attention":
        model = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, bias=bias)
    optimizer = Preconditioned(model.parameters(), keep)
    x = torch.randn(6, 8)

    def step():
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for _ in range(2):
        step()
    options = {"optimizers": [optimizer], "inplace": True}
    if convert == "attention":
        split_attention(model, **options)
    elif convert == "low rank":
        compress(model, LowRank(min_features=0), progress=False, **options)
    elif convert == "lower":
        compress(model, LowRank(rank=2), progress=False, **options)
    else:
        layers = "0" if convert == "neighbor" else "*"
        compress(model, BlockDiagonal(2, permute=convert != "replace"), layers, progress=False, **options)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(p.isfinite().all() for p in model.parameters())
    assert set(optimizer.state) == set(model.parameters())


def test_elementwise_state_of_other_optimizers_is_kept():
    class Lion(torch.optim.SGD):
        """From another library, by its module's name."""

    model = mlp(8, 8, 6)
    optimizer = Lion(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(3, 8, dtype=torch.float64)).sum().backward()
    optimizer.step()
    optimizer.state[model[0].weight].update(options={"beta": 0.9}, counts=[1, torch.tensor(2)])
    was = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    compress(model, BlockDiagonal(2), optimizers=optimizer, inplace=True, progress=False)
    state = optimizer.state[model[0].weight]
    assert torch.equal(state["momentum_buffer"][0], was[:4, :4])
    assert (state["options"], state["counts"]) == ({"beta": 0.9}, [1, torch.tensor(2)])


def test_optimizers_that_keep_parameters_in_dictionaries_are_refused():
    class Slow(torch.optim.SGD):
        def __init__(self, params):
            super().__init__(params, lr=0.1)
            self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    model = mlp(8, 8)
    optimizer = Slow(model.parameters())
    with unchanged(model, optimizer), pytest.raises(ValueError, match="Slow keeps parameters in its slow too"):
        permuted(model, optimizers=optimizer)


def test_a_neighbor_made_in_inference_mode():
    with torch.inference_mode():
        model = mlp(8, 8, 4).requires_grad_(False)
        x = torch.randn(5, 8, dtype=torch.float64)
        copied, _ = compress(model, BlockDiagonal(2, permute=True), "0", progress=False)
    weight = model[2].weight
    with torch.no_grad():
        torch.testing.assert_close(permuted(model)(x), copied(x))
    assert model[2].weight is weight


def test_gradients_are_copies():
    model = nn.Sequential(nn.Linear(8, 8))
    model(torch.randn(3, 8)).sum().backward()
    gradient = model[0].bias.grad
    compress(model, LowRank(rank=2, min_features=1), inplace=True, progress=False)
    assert torch.equal(model[0].bias.grad, gradient)
    model[0].bias.grad.zero_()
    assert gradient.any()
