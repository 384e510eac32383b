"""docs/compatibility.md, for every public module."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import fx, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import blockdiag
from every_module import CASES, first, initialized

every_module = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def test_none_is_missing():
    exported = {kind for kind in vars(blockdiag).values() if isinstance(kind, type) and issubclass(kind, nn.Module)}
    assert exported <= {type(case.make()) for case in CASES.values()}


def assert_same(actual, expected, inputs):
    assert_close(actual(*inputs), expected(*inputs))


@every_module
def test_copies_and_pickles(case):
    module, inputs = initialized(case), case.inputs(3)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    for other in others:
        assert_same(other, module, inputs)
        assert repr(other) == repr(module)
        memory = [{p.data_ptr() for p in each.parameters() if p.numel() > 0} for each in (other, module)]
        assert not memory[0] & memory[1]


@every_module
def test_state_dict(case):
    module, inputs = initialized(case), case.inputs(3)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    other = initialized(case, dtype=torch.float64)
    other.load_state_dict(state)
    assert_close(first(other(*[x.double() for x in inputs])).float(), first(module(*inputs)))


@every_module
def test_meta_device(case):
    """Created there by argument or context, and materialized by a state dict, into new memory or by assignment."""
    module, inputs = initialized(case), case.inputs(3)
    outputs = module(*inputs)
    for way in ("argument", "context"):
        if way == "argument":
            meta = case.make(device="meta")
        else:
            with torch.device("meta"):
                meta = case.make()
        meta.eval()
        assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
        assert first(meta(*[x.to("meta") for x in inputs])).shape == first(outputs).shape
        assigned = copy.deepcopy(meta)
        assigned.load_state_dict(module.state_dict(), assign=True)
        assert_same(assigned, module, inputs)
        filled = meta.to_empty(device="cpu")
        filled.load_state_dict(module.state_dict())
        assert_same(filled, module, inputs)


@every_module
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(case, dtype):
    module = initialized(case, dtype=dtype)
    inputs = [x.to(dtype) for x in case.inputs(3)]
    output = first(module(*inputs))
    assert output.dtype == dtype
    expected = first(copy.deepcopy(module).double()(*[x.double() for x in inputs]))
    assert_close(output.double(), expected, rtol=0.02, atol=0.02 * expected.abs().max().item())


@every_module
def test_default_dtype(case):
    torch.set_default_dtype(torch.float64)
    try:
        module = initialized(case)
        assert first(module(*case.inputs(3))).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@every_module
def test_autocast(case):
    module, inputs = initialized(case), case.inputs(3)
    with torch.autocast("cpu", torch.bfloat16):
        output = first(module(*inputs))
    assert output.dtype == torch.bfloat16
    expected = first(module(*inputs))
    assert_close(output.float(), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())
    output.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.grad is not None)


@every_module
def test_fx(case):
    """Alone and inside of a model; the result runs, pickles and scripts."""
    module, inputs = initialized(case), case.inputs(3)
    if not case.traceable:
        with pytest.raises((ValueError, TypeError)):
            fx.symbolic_trace(module)
        return
    traced = fx.symbolic_trace(module)
    assert_same(traced, module, inputs)
    assert_same(pickle.loads(pickle.dumps(traced)), module, inputs)
    if len(inputs) == 1:
        traced = fx.symbolic_trace(nn.Sequential(module))
        assert_same(traced, module, inputs)
        assert_same(torch.jit.script(traced), module, inputs)


@every_module
def test_torchscript(case):
    module, inputs = initialized(case), case.inputs(3)
    if not case.traceable:
        assert_same(torch.jit.trace(module, inputs), module, inputs)
        return
    scripted = torch.jit.script(module)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    others = [scripted, torch.jit.load(buffer), torch.jit.freeze(scripted), torch.jit.trace(module, inputs)]
    for other in others:
        assert_same(other, module, inputs)
        assert_same(other, module, case.inputs(5))


@every_module
def test_compile(case):
    """In one graph for all batch sizes, forward and backward."""
    torch._dynamo.reset()
    module = initialized(case)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for batch in (6, 7):  # unlike the other sizes of the inputs, which a graph would otherwise treat as equal
        inputs = [x.requires_grad_() for x in case.inputs(batch)]
        results = [torch.autograd.grad(first(layer(*inputs)).sin().sum(), inputs) for layer in (compiled, module)]
        assert_close(*results)
    assert len(graphs) == 1


@every_module
def test_export(case):
    module, inputs = initialized(case), case.inputs(3)
    batch = {0: torch.export.Dim("batch")}
    for strict in (False, True):
        program = torch.export.export(module, inputs, dynamic_shapes=(batch,) * len(inputs), strict=strict)
        for size in (3, 5):
            assert_same(program.run_decompositions().module(), module, case.inputs(size))


@every_module
def test_checkpointing(case):
    module, inputs = initialized(case), [x.requires_grad_() for x in case.inputs(3)]
    expected = torch.autograd.grad(first(module(*inputs)).sin().sum(), inputs)
    output = first(checkpoint(module, *inputs, use_reentrant=False))
    assert_close(torch.autograd.grad(output.sin().sum(), inputs), expected)


@every_module
def test_vmap_over_an_ensemble(case):
    modules, inputs = [initialized(case) for _ in range(3)], case.inputs(3)
    parameters, buffers = stack_module_state(modules)
    outputs = vmap(lambda p, b: functional_call(modules[0], (p, b), inputs))(parameters, buffers)
    for index, module in enumerate(modules):
        assert_close(tree_map(lambda output, i=index: output[i], outputs), module(*inputs))


@every_module
def test_per_sample_gradients(case):
    module, inputs = initialized(case, dtype=torch.float64), [x.double() for x in case.inputs(3)]
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(parameters, *sample):
        return first(functional_call(module, parameters, tuple(x.unsqueeze(0) for x in sample))).sin().sum()

    actual = vmap(grad(loss), (None, *[0] * len(inputs)))(parameters, *inputs)
    for index in range(3):
        expected = grad(loss)(parameters, *[x[index] for x in inputs])
        assert_close({name: value[index] for name, value in actual.items()}, expected)


@every_module
def test_gradients_of_any_order(case):
    module = initialized(case, dtype=torch.float64)
    inputs = [x.double().requires_grad_() for x in case.inputs(2)]

    def function(*inputs):
        return first(module(*inputs))

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every_module
def test_parametrizations(case):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module, inputs = initialized(case), case.inputs(3)
    expected = copy.deepcopy(module)
    for layer in list(module.modules()):
        if isinstance(vars(layer).get("_parameters", {}).get("weight"), nn.Parameter):
            parametrize.register_parametrization(layer, "weight", Doubled())
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            if name.rpartition(".")[2] == "weight":
                parameter.mul_(2)
    assert_same(module, expected, inputs)
    first(module(*inputs)).sum().backward()
    assert all(p.grad is not None for name, p in module.named_parameters() if name.endswith("original"))


@every_module
def test_jagged_inputs(case):
    module = initialized(case)
    parts = [torch.randn(length, 12) for length in (3, 0, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    if not case.takes_jagged:
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            module(nested)
        return
    output = module(nested)
    for actual, part in zip(output.unbind(), parts, strict=True):
        assert_close(actual, module(part))
    output.values().sum().backward()
    whole = torch.cat(parts).requires_grad_()
    assert_close(nested.grad.values(), torch.autograd.grad(module(whole).sum(), whole)[0])


@every_module
def test_shapes_of_batches(case):
    """No batch dimension, and several, if the module supports any number."""
    module = initialized(case)
    assert first(module(*case.inputs(0))).numel() == 0
    if case.takes_jagged:  # linear in the last dimension
        (x,) = case.inputs(6)
        assert_close(module(x[0]), module(x)[0])
        assert_close(module(x.view(2, 1, 3, 12)), module(x).view(2, 1, 3, 8))
        assert module(x[:0].view(0, 3, 12)).shape == (0, 3, 8)


class Tagged(torch.Tensor):
    """A subclass that keeps its type through every function, as torch.Tensor's default does."""


@every_module
def test_subclasses(case):
    module, inputs = initialized(case), case.inputs(3)
    output = first(module(*[x.as_subclass(Tagged) for x in inputs]))
    assert type(output) is Tagged
    assert_close(output.as_subclass(torch.Tensor), first(module(*inputs)))


UNQUANTIZED = (blockdiag.BlockDiagLinear, blockdiag.BlockSparseLinear, blockdiag.PermutedBlockDiagLinear)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
@every_module
@pytest.mark.parametrize("requested", [None, {*UNQUANTIZED}], ids=["all", "ours"])
def test_torch_quantizes_what_it_knows_and_names_what_not(case, requested):
    """torch's linear layers become int8; ours stay, with a warning."""
    module, inputs = nn.ModuleList([initialized(case)]), case.inputs(3)
    expected = first(module[0](*inputs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quantized = torch.ao.quantization.quantize_dynamic(module, requested)
    ours = {type(layer).__name__ for layer in module.modules() if isinstance(layer, UNQUANTIZED)}
    messages = [str(warning.message) for warning in caught]
    for name in ours:
        assert any(f"has no quantized form of {name}, and leaves it as it is" in message for message in messages)
    if not ours:
        assert not any("has no quantized form" in message for message in messages)
    output = first(quantized[0](*inputs))
    assert_close(output, expected, rtol=0.1, atol=0.1 * expected.abs().max().item())
    assert not any(hasattr(layer, "qconfig") for layer in quantized.modules())


def test_a_traced_ensemble_refuses_the_inputs_that_it_was_not_traced_for():
    """torch.fx traces one branch: one input for all models or, with concrete_args, one per model."""
    case = CASES["StackedModel"]
    module, (x,) = initialized(case), case.inputs(3)
    inputs = torch.stack([x, -x, x + 1])
    with pytest.raises(AssertionError, match=r"StackedModel: traced by torch.fx, but not with stacked=True"):
        fx.symbolic_trace(module)(inputs, True)
    script = torch.jit.script(module)
    assert_close(script(inputs, stacked=True), module(inputs, stacked=True))


@pytest.mark.parametrize("way", ["fx", "script"])
def test_traced_attention_takes_all_arguments(way):
    case = CASES["SplitAttention"]
    module, inputs = initialized(case), case.inputs(3)
    traced = fx.symbolic_trace(module) if way == "fx" else torch.jit.script(module)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for options in (
        {"key_padding_mask": padding},
        {"attn_mask": causal, "is_causal": True},
        {"attn_mask": torch.randn(9, 5, 5), "key_padding_mask": padding, "need_weights": False},
        {"average_attn_weights": False},
    ):
        assert_close(traced(*inputs, **options), module(*inputs, **options))
    single = [x[0] for x in inputs]
    assert_close(traced(*single, key_padding_mask=padding[0]), module(*single, key_padding_mask=padding[0]))
    with pytest.raises((RuntimeError, torch.jit.Error), match="Need attn_mask if specifying the is_causal hint"):
        traced(*inputs, is_causal=True)
