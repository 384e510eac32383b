"""TorchUncertainty's packed layers computed by blockdiag, compared with the library's own implementations."""

import copy
import importlib
import importlib.util
import io
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from blockdiag.integrations import torch_uncertainty as integration

IMPLEMENTATIONS = ["full", "sparse", "einsum", "conv1d"]
spec = importlib.util.find_spec("torch_uncertainty")
pytestmark = pytest.mark.skipif(spec is None, reason="torch-uncertainty is not installed")


@pytest.fixture(scope="module", autouse=True)
def packed():
    """The module of packed layers; alone, if the library's other dependencies are not installed."""
    try:
        yield importlib.import_module("torch_uncertainty.layers.packed")
        return
    except ImportError:
        root = Path(spec.submodule_search_locations[0])
    for name, path in (("torch_uncertainty", root), ("torch_uncertainty.layers", root / "layers")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    yield importlib.import_module("torch_uncertainty.layers.packed")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch_uncertainty"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Records whether our op takes each call; uninstalls afterwards."""
    taken, is_ours = [], integration._is_ours

    def spy(*arguments):
        taken.append(is_ours(*arguments))
        return taken[-1]

    monkeypatch.setattr(integration, "_is_ours", spy)
    yield taken
    integration.uninstall()


def dense(tensor):
    return tensor.to_dense() if tensor.layout != torch.strided else tensor


def outputs_and_grads(layer, *inputs):
    inputs = [input.detach().clone().requires_grad_() for input in inputs]
    layer.zero_grad()
    output = layer(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(torch.arange(output.numel(), dtype=output.dtype).cos().view(output.shape))
    return output.detach(), [i.grad for i in inputs], {n: dense(p.grad) for n, p in layer.named_parameters()}


def assert_same_installed(layer, *inputs):
    expected = outputs_and_grads(layer, *inputs)
    with integration.installed():
        actual = outputs_and_grads(layer, *inputs)
    for name, parameter in layer.named_parameters():
        if parameter.layout != torch.strided:  # the library's gradient includes elements outside of the blocks
            expected[2][name] = expected[2][name] * (dense(parameter.detach()) != 0)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("first", "last"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("alpha", "estimators", "gamma"), [(1, 1, 1), (2, 2, 1), (1.5, 2, 2), (2, 4, 2)])
def test_packed_linear(packed, calls, implementation, first, last, alpha, estimators, gamma):
    for bias in (False, True):
        layer = packed.PackedLinear(
            16, 16, alpha, estimators, gamma, bias, first, last, implementation, dtype=torch.float64
        )
        features = int(16 * (1 if first else alpha))
        for leading in ((3,),) if implementation == "sparse" else ((3,), (2, 1, 3)):
            assert_same_installed(layer, torch.randn(*leading, features, dtype=torch.float64))
    assert calls
    assert all(calls)


class Attention(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, query, key=None, value=None):
        key = query if key is None else key
        return self.layer(query, key, key if value is None else value)


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 8, "vdim": 12}, {"bias": False}, {"add_bias_kv": True}, {"gamma": 2}], ids=str
)
@pytest.mark.parametrize("inputs", ["self", "key is value", "all"])
def test_packed_attention(packed, calls, options, inputs):
    if "kdim" in options and inputs != "all":
        options = {}
    layer = packed.PackedMultiheadAttention(24, 2, alpha=2, num_estimators=2, batch_first=True, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)  # the library leaves bias_k and bias_v uninitialized
    sizes = {
        "self": [48],
        "key is value": [48, 48],
        "all": [48, 2 * options.get("kdim", 24), 2 * options.get("vdim", 24)],
    }
    assert_same_installed(Attention(layer), *(torch.randn(2, 3, size, dtype=torch.float64) for size in sizes[inputs]))
    assert calls
    assert all(calls)


def test_packed_transformer(packed, calls):
    layer = packed.PackedTransformerEncoderLayer(
        d_model=24, nhead=2, dim_feedforward=32, alpha=2, num_estimators=2, dropout=0.0
    ).double()
    assert_same_installed(layer, torch.randn(3, 2, 48, dtype=torch.float64))
    assert len(calls) >= 4
    assert all(calls)


def test_what_the_library_refuses_it_still_refuses(packed, calls):
    """Stacked inputs, other numbers of groups, unknown implementations, mixed dtypes."""
    function = sys.modules["torch_uncertainty.layers.functional.packed"].packed_linear
    weight = torch.randn(2, 3, 4)
    bad = [
        (torch.randn(5, 2, 4), weight, 2, "conv1d"),
        (torch.randn(5, 8), weight, 2, "fastest"),
        (torch.randn(5, 8, dtype=torch.float64), weight, 2, "full"),
        (torch.randn(5, 8), weight, 2, "full", torch.randn(7)),
    ]
    for arguments in bad:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            function(*arguments)
        with integration.installed():
            replaced = sys.modules["torch_uncertainty.layers.functional.packed"].packed_linear
            assert replaced is not function
            with pytest.raises(type(expected.value)) as actual:
                replaced(*arguments)
        assert str(actual.value) == str(expected.value)
    assert not any(calls)


def test_installing_twice_and_taking_back(packed, calls):
    functional = sys.modules["torch_uncertainty.layers.functional.packed"]
    before = functional.packed_linear, packed.packed_linear, vars(packed.PackedLinear).get("_load_from_state_dict")
    integration.install()
    with integration.installed():
        pass
    layer = packed.PackedLinear(4, 4, 1, 2)
    layer(torch.randn(2, 4))
    assert calls == [True]  # still installed after the inner block
    integration.uninstall()
    integration.uninstall()
    assert before == (
        functional.packed_linear,
        packed.packed_linear,
        vars(packed.PackedLinear).get("_load_from_state_dict"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(packed, calls, dtype):
    layer = packed.PackedLinear(32, 32, 1, 4)
    x = torch.randn(8, 32)
    with torch.autocast("cpu", dtype):
        expected = layer(x)
        with integration.installed():
            actual = layer(x)
    assert calls == [True]
    assert actual.dtype == expected.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("implementation", ["full", "einsum", "conv1d"])
def test_compile_export_and_pickle(packed, implementation):
    layer = packed.PackedLinear(16, 8, 2, 2, implementation=implementation)
    x = torch.randn(4, 32)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    with integration.installed():
        torch.testing.assert_close(compiled(x), expected)
        assert "blockdiag" in torch.export.export(layer, (x,)).graph_module.code
        buffer = io.BytesIO()
        torch.save(layer, buffer)
    torch.testing.assert_close(compiled(x), expected)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer, weights_only=False)(x), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("saved", IMPLEMENTATIONS)
def test_checkpoints_of_other_implementations(packed, saved, implementation):
    source, layer = (packed.PackedLinear(16, 8, 2, 2, 2, implementation=kind) for kind in (saved, implementation))
    x, state = torch.randn(3, 32), copy.deepcopy(source.state_dict())
    expected = source(x)
    network = nn.Sequential(layer)
    with integration.installed():
        network.load_state_dict({f"0.{key}": value for key, value in state.items()})
    torch.testing.assert_close(layer(x), expected)
    other = nn.Sequential(packed.PackedLinear(16, 8, 2, 2, 2, implementation=implementation))
    other.load_state_dict(integration.convert_state_dict(other, {f"0.{key}": value for key, value in state.items()}))
    torch.testing.assert_close(other(x), expected)


def test_checkpoints_of_older_versions(packed):
    layer = packed.PackedLinear(16, 8, 2, 2)
    weight, bias = torch.randn(16, 16, 1), torch.randn(16)
    with integration.installed():
        layer.load_state_dict({"conv1x1.weight": weight, "conv1x1.bias": bias})  # 0.1 and 0.2
        x = torch.randn(3, 32)
        expected = nn.functional.conv1d(x.unsqueeze(-1), weight, bias, groups=2).squeeze(-1)
        torch.testing.assert_close(layer(x), expected)
        attention = packed.PackedMultiheadAttention(24, 2, alpha=2, num_estimators=2, first=True)
        blocks = torch.randn(2, 24, 24)
        old = {key.replace("out_proj_", "out_proj."): value for key, value in attention.state_dict().items()}
        attention.load_state_dict({**old, "out_proj.weight": blocks})  # 0.4
        torch.testing.assert_close(attention.out_proj_weight[0].detach(), torch.block_diag(*blocks))
        with pytest.raises(RuntimeError, match="size mismatch"):
            layer.load_state_dict({"weight": torch.randn(3, 3, 3), "bias": bias})
        with pytest.raises(RuntimeError, match="Missing key"):
            layer.load_state_dict({"bias": bias})
        with pytest.raises(ValueError, match="'weight' has elements outside of its 2 blocks"):
            layer.load_state_dict({"weight": torch.ones(16, 32), "bias": bias})


def test_the_sparse_implementation_trains(packed, calls):
    layer = packed.PackedLinear(16, 8, 2, 2, implementation="sparse")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = torch.randn(4, 32)
    losses = []
    with integration.installed():
        for _ in range(5):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert calls == [True] * 5
        # An exact zero is not an element of the sparse weight: falls back to the library.
        weight = layer.weight.detach().to_dense()
        weight[0, 0] = 0
        layer.weight = nn.Parameter(weight.to_sparse())
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
        assert len(calls) == 5


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "sparse"])
def test_meta_device(packed, calls, implementation):
    """Created there by argument or context, run, and filled by a state dict of any form, on any device."""
    with integration.installed():
        state = packed.PackedLinear(16, 16, 2, 2, implementation=implementation).state_dict()
        for way in ("argument", "context"):
            if way == "argument":
                layer = packed.PackedLinear(16, 16, 2, 2, implementation=implementation, device="meta")
            else:
                with torch.device("meta"):
                    layer = packed.PackedLinear(16, 16, 2, 2, implementation=implementation)
            x = torch.empty(3, 32, device="meta")
            assert layer(x).shape == (3, 32)
            assert layer(x).is_meta
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.float32
            dense = torch.block_diag(*state["weight"])
            layer.load_state_dict({"weight": dense.to("meta"), "bias": state["bias"].to("meta")}, assign=True)
            assert layer.weight.is_meta
            layer.load_state_dict(state, assign=True)
            assert layer(torch.randn(3, 32)).isfinite().all()
        assert all(calls)


def test_meta_attention(packed, calls):
    with integration.installed():
        layer = packed.PackedMultiheadAttention(24, 2, alpha=2, num_estimators=2, batch_first=True).to("meta")
        x = torch.empty(2, 3, 48, device="meta")
        assert layer(x, x, x)[0].shape == (2, 3, 48)
    assert calls
    assert all(calls)


def test_installed_stays_so_where_the_integration_is_imported_again(packed, monkeypatch):
    original = packed.packed_linear
    integration.install()
    installed = packed.packed_linear
    importlib.reload(integration)
    integration.install()
    assert packed.packed_linear is installed
    integration.uninstall()
    assert packed.packed_linear is original


@pytest.mark.parametrize("missing", ["torch_uncertainty.layers.packed", "packed_linear"])
def test_what_to_install(packed, monkeypatch, missing):
    if missing == "packed_linear":
        monkeypatch.delattr(packed, missing)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"needs TorchUncertainty 0\.5 or newer: pip install torch-uncertainty"):
        integration.install()
    assert not integration._replaced
