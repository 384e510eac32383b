"""stack_models: the same outputs and gradients as the separate models, and the same models back."""

import copy

import pytest
import torch
from torch import nn

from blockdiag import stack_models


def make_mlp():
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.BatchNorm1d(16),
        nn.PReLU(16),
        nn.Dropout(0.1),
        nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16), nn.GELU()),
        nn.RMSNorm(16),
        nn.PReLU(),
        nn.LayerNorm(16, elementwise_affine=False),
        nn.BatchNorm1d(16, affine=False, track_running_stats=False),
        nn.Linear(16, 5),
        nn.LogSoftmax(-1),
    )


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.again = self.first

    def forward(self, input):
        return self.norm(input + torch.relu(self.second(torch.relu(self.again(self.first(input))))))


def trained(make, count=4, dtype=torch.float32):
    """Models whose statistics also differ."""
    models = [make().to(dtype) for _ in range(count)]
    for model in models:
        for _ in range(3):
            model(torch.randn(8, 12, dtype=dtype) * 2 + 1)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return models


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_computes_what_its_models_compute(training, dtype, device):
    models = [model.to(device).train(training) for model in trained(make_mlp, dtype=dtype)]
    for model in models:
        model[4].p = 0.0  # dropout draws different numbers
    stacked = stack_models(models)
    alone = [copy.deepcopy(model) for model in models]
    x = torch.randn(7, 3, 4, dtype=dtype, device=device)
    output, expected = stacked(x), torch.stack([model(x) for model in alone])
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(expected)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for model, grads in zip(alone, _models_of_grads(stacked), strict=True):
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-5)
    each = torch.randn(4, 7, 3, 4, dtype=dtype, device=device)
    torch.testing.assert_close(
        stacked(each, stacked=True), torch.stack([model(part) for model, part in zip(alone, each, strict=True)])
    )
    for model, back in zip(alone, stacked.to_models(), strict=True):  # includes statistics learned since
        torch.testing.assert_close(back.state_dict(), model.state_dict())


def _models_of_grads(stacked):
    """The gradients, split like the parameters."""
    carrier = copy.deepcopy(stacked)
    for parameter, source in zip(carrier.parameters(), stacked.parameters(), strict=True):
        parameter.data.copy_(source.grad)
    return [list(model.parameters()) for model in carrier.to_models()]


@pytest.mark.parametrize("make", [make_mlp, Residual])
def test_round_trip_is_exact(make):
    models = trained(make)
    models[0].eval(), [model.eval() for model in models]
    for model in models:
        next(model.parameters()).requires_grad_(False)
    stacked = stack_models(models, torch.randn(6, 12))
    assert not stacked.training
    back = copy.deepcopy(stacked).to_models()
    for model, again in zip(models, back, strict=True):
        assert repr(again) == repr(model)
        assert [m.training for m in again.modules()] == [m.training for m in model.modules()]
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    if make is Residual:
        assert back[0].again is back[0].first
        assert back[1].first is not back[0].first
    # Training the returned or the stacked models does not affect the others.
    before = [copy.deepcopy(model.state_dict()) for model in models]
    for parameter in stacked.parameters():
        parameter.data.add_(1)
    for model, state in zip(models, before, strict=True):
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("between", [nn.ReLU, nn.PReLU, lambda: nn.LayerNorm(0), lambda: nn.Linear(0, 0)])
def test_layers_without_features(count, between):
    models = [
        nn.Sequential(nn.Linear(3, 0), between(), nn.Linear(0, 4), nn.Linear(4, 0, bias=False)) for _ in range(count)
    ]
    models = [nn.Sequential(*model[:stop]) for stop in (1, 2, 3, 4) for model in models]
    for start in range(0, len(models), count):
        alone = models[start : start + count]
        stacked = stack_models(alone)
        for shape in ((5, 3), (3,), (0, 3), (2, 5, 3)):
            x = torch.randn(shape)
            expected = torch.stack([model(x) for model in alone])
            torch.testing.assert_close(stacked(x), expected)
            torch.testing.assert_close(stacked(x.expand(count, *shape), stacked=True), expected)
        for model, back in zip(alone, stacked.to_models(), strict=True):
            torch.testing.assert_close(back.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_stacked_model_keeps_nothing_of_its_models():
    class Listing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 3), []

        def forward(self, x):
            self.seen.append(x.shape)
            return self.layer(x)

    models = [Listing() for _ in range(2)]
    stacked = stack_models(models, torch.randn(4, 3))
    stacked(torch.randn(4, 3))
    assert not models[0].seen
    assert len(stacked.stacked.seen) == 1
    compiled = [torch.compile(model, backend="eager") for model in models]
    with pytest.raises(ValueError, match="'' has a forward of its own"):
        stack_models(compiled, torch.randn(4, 3))


def test_numbers_of_batches_come_back():
    models = [nn.Sequential(nn.BatchNorm1d(3)) for _ in range(3)]
    for count, model in enumerate(models):
        for _ in range(3 + count):
            model(torch.randn(4, 3))
    stacked = stack_models(models)
    stacked(torch.randn(4, 3))
    assert [int(model[0].num_batches_tracked) for model in stacked.to_models()] == [4, 5, 6]
    for model in models:
        model[0].momentum = None
    with pytest.raises(ValueError, match=r"to have seen equally many batches, but got \[3, 4, 5\]"):
        stack_models(models)


def test_a_first_layer_in_place():
    models = [nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)) for _ in range(2)]
    x = torch.randn(4, 3)
    expected = torch.stack([model(x.clone()) for model in models])
    torch.testing.assert_close(stack_models(models)(x), expected)


def test_forwards_of_their_own():
    models = trained(Residual, 3)
    with pytest.raises(ValueError, match="'' is a Residual with a forward of its own: give an example_input"):
        stack_models(models)
    stacked = stack_models(models, torch.randn(5, 12))
    x = torch.randn(2, 6, 12)
    torch.testing.assert_close(stacked(x), torch.stack([model(x) for model in models]))
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), stacked(x))

    class OverBatch(Residual):
        def forward(self, input):
            return self.first(input) / input.norm(dim=1, keepdim=True)

    with pytest.raises(ValueError, match="stacked, the models do not compute what they compute alone"):
        stack_models([OverBatch(), OverBatch()], torch.randn(5, 12))


class Scaled(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 3))
        self.scale = nn.Parameter(torch.ones(3))


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def hooked():
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ([], "expected at least one model, but got none"),
        ([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 4))], "model 1 has '0' = Linear.*out_features=4"),
        ([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.ReLU())], "model 1 has '1' = ReLU"),
        ([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)).double()], "model 1 has .* torch.float64"),
        ([nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3)).eval()], "model 1 has .*training=False"),
        ([nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), tied()], "model 1 has '1' = Linear"),
        ([tied(), tied()], "'0' and '1' share a parameter"),
        ([hooked(), hooked()], "'0' has hooks"),
        ([Scaled()], "'' is a Scaled with tensors that cannot be stacked"),
        ([nn.Sequential(nn.Conv2d(3, 3, 1))], "'0' is a Conv2d with tensors that cannot be stacked"),
        ([nn.Sequential(nn.LayerNorm((2, 3)))], "'0' normalizes over 2 dimensions; only 1 can be stacked"),
        ([nn.Sequential(nn.Softmax(1))], "'0' is over dimension 1; set dim=-1"),
        ([nn.Sequential(nn.Linear(3, 3), nn.Flatten())], r"nn.Flatten can be stacked at the start"),
        ([nn.Sequential(nn.MaxPool1d(2))], "'0' is a MaxPool1d, which cannot be stacked"),
    ],
)
def test_bad_models(models, message):
    with pytest.raises(ValueError, match=message):
        stack_models(models)


def test_a_stacked_input_has_one_part_for_each_model():
    stacked = stack_models([nn.Sequential(nn.Linear(3, 3))] * 2)
    with pytest.raises(ValueError, match="expected one input for each of 2 models in the first dimension"):
        stacked(torch.randn(3, 4, 3), stacked=True)


@pytest.mark.parametrize("shared", [nn.GELU(), nn.Linear(8, 8)], ids=["activation", "layer"])
@pytest.mark.parametrize("flatten", [False, True])
def test_a_module_that_is_used_twice_at_the_top(shared, flatten):
    def make():
        part = copy.deepcopy(shared)
        parts = [nn.Linear(8, 8), part, nn.Linear(8, 8), part, nn.Linear(8, 3)]
        return nn.Sequential(*([nn.Flatten()] if flatten else []), *parts)

    models, x = [make() for _ in range(3)], torch.randn(5, 8)
    torch.testing.assert_close(stack_models(models)(x), torch.stack([model(x) for model in models]))


class CentersInTraining(nn.Module):
    """Centers over dimension 1, which is a different one in stacked models."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.up(x)
        return self.down(hidden - hidden.mean(1, keepdim=True) if self.training else hidden)


def test_models_are_compared_in_training_too():
    with pytest.raises(ValueError, match="in training mode, perhaps because"):
        stack_models([CentersInTraining().eval() for _ in range(3)], torch.randn(5, 8))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 8), torch.full((8,), 2.0)

    def forward(self, x):
        return self.layer(x) * self.scale


def test_models_that_come_back_have_their_tensors():
    models, x = [Scaled(), Scaled()], torch.randn(5, 8)
    for model, back in zip(models, stack_models(models, x).to_models(), strict=True):
        torch.testing.assert_close(back(x), model(x))
