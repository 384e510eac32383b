"""Equal conversions give equal structures, whatever the values: checkpoints load, folding needs no global state."""

import copy
import itertools
import random
import threading

import pytest
import torch
from torch import nn
from unchanged import unchanged

from blockdiag import BlockDiagonal, LowRank, PermutedBlockDiagLinear, compress
from models import mlp

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Identity, lambda: nn.Dropout(0.1), lambda: nn.Softmax(-1)]


def random_model(seed):
    """A small model and a conversion config, both determined by the seed; the values are new each time."""
    draw = random.Random(seed)
    sizes = [draw.choice([4, 8, 12]) for _ in range(draw.randint(2, 6))]
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out, bias=draw.random() < 0.7), draw.choice(ACTIVATIONS)()]
    if draw.random() < 0.3:
        layers.append(nn.Sequential(nn.Linear(sizes[-1], 8), nn.GELU(), nn.Linear(8, 4)))
    model = nn.Sequential(*layers)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = {name: draw.choice([1, 2, 4]) for name in names if draw.random() < 0.7} or {names[0]: 2}
    return model.double(), chosen, torch.randn(30, sizes[0], dtype=torch.float64)


def special(model, seed):
    """Degenerate values: zeros, identity matrices, repeated rows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if seed % 3 == 0:
                parameter.zero_()
            elif seed % 3 == 1 and parameter.dim() == 2:
                parameter.copy_(torch.eye(*parameter.shape))
            elif parameter.dim() == 2:
                parameter.copy_(parameter[:1].clone().expand_as(parameter))
    return model


@pytest.mark.parametrize("seed", range(60))
def test_checkpoints_of_models_converted_alike(seed):
    pytest.importorskip("sklearn")
    torch.manual_seed(seed)
    model, blocks, x = random_model(seed)
    others = [random_model(seed)[0], special(random_model(seed)[0], seed), special(random_model(seed)[0].train(), seed)]
    calibration = [x] if seed % 2 else None
    configs = {name: BlockDiagonal(num_blocks, permute=True) for name, num_blocks in blocks.items()}
    trained, _ = compress(model, configs, calibration=calibration, progress=False)
    for other in others:
        with torch.no_grad():
            fresh, _ = compress(other, configs, progress=False)
        assert list(fresh.state_dict()) == list(trained.state_dict())
        assert repr(fresh) == repr(trained)
        for source, target in ((trained, fresh), (fresh, trained)):
            target = copy.deepcopy(target)
            target.load_state_dict(source.state_dict())
            torch.testing.assert_close(target.eval()(x), copy.deepcopy(source).eval()(x), rtol=0, atol=0)


class Gated(nn.Module):
    """A forward that depends on values: a trace would not hold for other values."""

    def __init__(self, gate):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("gate", torch.tensor(gate))

    def forward(self, x):
        hidden = self.up(x)
        return self.down(hidden) if self.gate else self.down(hidden) + hidden


def test_what_depends_on_values_is_not_folded():
    states = [compress(Gated(g), BlockDiagonal(2, permute=True), progress=False)[0].state_dict() for g in (0, 1)]
    assert list(states[0]) == list(states[1])
    assert "up.output_permutation" in states[0]
    head = mlp(8, 8, 4)
    head[2].weight.data[0, 0] = torch.nan  # a neighbor's values do not matter
    new, _ = compress(head, BlockDiagonal(2, permute=True), "0", progress=False)
    assert new[0].output_permutation is None


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.last = nn.Linear(8, 8), nn.Linear(8, 8), None

    def forward(self, x):
        hidden = self.up(x)
        self.last = {"hidden": [hidden]}
        return self.down(hidden.relu())


def test_nothing_is_folded_where_a_hook_sees_the_features():
    """Values that a forward keeps, and that a container's hook observes, keep the order of their features."""
    kept = Keeps()
    hooked = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 8))
    hooked[0].register_forward_hook(lambda *_: None)
    for model, first in ((kept, "up"), (hooked, "0.0")):
        new, _ = compress(model, BlockDiagonal(4, permute=True), progress=False)
        assert new.get_submodule(first).output_permutation is not None
    hooked[0]._forward_hooks.clear()
    hooked.register_forward_hook(lambda *_: None)  # observes inputs and outputs, which stay
    new, _ = compress(hooked, BlockDiagonal(4, permute=True), progress=False)
    assert new[0][0].output_permutation is None


class Positions(nn.Module):
    """A module with its own parameters and constants, which do not prevent folding."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.position, self.scale = nn.Parameter(torch.randn(8)), nn.Parameter(torch.ones(8))
        self.register_buffer("mask", torch.ones(8))

    def forward(self, x):
        x = x + self.position
        return self.down(torch.tanh(self.up(x))) * self.scale * self.mask * torch.full((8,), 2.0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compiled", [None, "wrapper", "in place"])
def test_folded_beside_parameters_buffers_and_compiled_code(training, compiled):
    model = Positions().train(training)
    x = torch.randn(5, 8)
    if compiled == "wrapper":
        model = torch.compile(model, backend="eager")
    elif compiled == "in place":
        model.compile(backend="eager")
    with unchanged(model):
        new, _ = compress(model, BlockDiagonal(4, permute=True), progress=False)
    up, down = getattr(new, "_orig_mod", new).up, getattr(new, "_orig_mod", new).down
    assert type(up) is type(down) is PermutedBlockDiagLinear
    assert up.output_permutation is None
    plain = Positions()
    plain.load_state_dict(getattr(model, "_orig_mod", model).state_dict())
    plain.up.register_forward_hook(lambda *_: None)
    expected, _ = compress(plain, BlockDiagonal(4, permute=True), progress=False)
    assert expected.up.output_permutation is not None
    torch.testing.assert_close(new(x), expected(x))


def test_a_model_served_beside_conversions():
    """Other threads call and read another model and draw random numbers during conversions."""
    served, x, errors, done = mlp(8, 8, 8), torch.randn(4, 8, dtype=torch.float64), [], threading.Event()
    expected = served(x).detach()
    calls = [nn.Module.__call__, nn.Module.__getattr__]

    def serve():
        while not done.is_set():
            try:
                assert torch.equal(served(x), expected)
                assert [nn.Module.__call__, nn.Module.__getattr__] == calls
            except BaseException as error:
                errors.append(error)
                return

    def convert():
        try:
            for _ in range(15):
                compress(mlp(8, 8, 8), BlockDiagonal(2, permute=True), calibration=[x.repeat(4, 1)], progress=False)
                compress(mlp(8, 8), LowRank(min_features=0), calibration=[x.repeat(4, 1)], progress=False)
        except BaseException as error:
            errors.append(error)

    servers = [threading.Thread(target=serve) for _ in range(2)]
    converters = [threading.Thread(target=convert) for _ in range(2)]
    for thread in (*servers, *converters):
        thread.start()
    for thread in converters:
        thread.join()
    done.set()
    for thread in servers:
        thread.join()
    assert not errors
    assert torch.compiler.is_compiling() is False
    from torch._dynamo.eval_frame import _stance

    assert _stance.stance == "default"
