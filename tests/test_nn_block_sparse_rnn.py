"""Block-sparse recurrent layers compute what the layers of torch.nn compute with the same zeros."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from blockdiag import BlockSparseGRU, BlockSparseLSTM

KINDS = {"GRU": (nn.GRU, BlockSparseGRU), "LSTM": (nn.LSTM, BlockSparseLSTM)}

every_kind = pytest.mark.parametrize(("dense_kind", "kind"), KINDS.values(), ids=KINDS)


def flat(result):
    """Tensors of (output, state)."""
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


@every_kind
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_same_as_dense(diagonal, bias, batch_first, bidirectional, layers, dense_kind, kind):
    """Outputs, states and all gradients, with zeros and given states; batched and not."""
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    sparse = kind(8, 16, block_size=(8, 2), density=0.3, diagonal=diagonal, dtype=torch.float64, **options)
    dense = sparse.to_dense()
    assert type(dense) is dense_kind
    for shape in ((5, 3, 8), (5, 8)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        expected = flat(dense(x))
        assert_close(flat(sparse(x)), expected)
        grads = [torch.autograd.grad(sum(t.sin().sum() for t in flat(layer(x))), x)[0] for layer in (sparse, dense)]
        assert_close(*grads)
        state = [torch.randn_like(t) for t in expected[1:]]
        state = state[0] if len(state) == 1 else tuple(state)
        assert_close(flat(sparse(x, state)), flat(dense(x, state)))


@every_kind
def test_from_dense(dense_kind, kind):
    dense = dense_kind(16, 32, 2, bidirectional=True, dropout=0.5).eval()
    x = torch.randn(6, 2, 16)
    whole = kind.from_dense(dense, (16, 4), 1.0)
    assert_close(flat(whole(x)), flat(dense(x)))
    assert not whole.training
    assert whole.dropout == 0.5
    part = kind.from_dense(dense, (16, 4), 0.25)
    assert {layer.density for layer in [*part.input_layers, *part.recurrent_layers]} == {0.25}
    assert_close(part.recurrent_layers[0].diagonal[:32], dense.weight_hh_l0[:32].diagonal())
    assert part.input_layers[0].diagonal is None
    assert_close(flat(part.to_dense()(x)), flat(part(x)))
    with pytest.raises(ValueError, match=r"from_dense: the layer is a torch.nn.modules.rnn.RNN"):
        kind.from_dense(nn.RNN(16, 32))
    with pytest.raises(TypeError, match=r"from_dense: expected an nn\.\w+, but got str"):
        kind.from_dense("layer")


@every_kind
def test_steps_are_the_sequence(dense_kind, kind):
    layer = kind(16, 32, 2, block_size=(16, 1), density=0.2)
    x, state = torch.randn(5, 16), None
    outputs = []
    with torch.no_grad():
        for step in x:
            output, state = layer(step.unsqueeze(0), state)
            outputs.append(output)
        assert_close(torch.cat(outputs), layer(x)[0])
        assert_close(flat((outputs[-1], state))[1:], flat(layer(x))[1:])


def test_projections_are_refused():
    with pytest.raises(ValueError, match=r"has projections \(proj_size=4\)"):
        BlockSparseLSTM.from_dense(nn.LSTM(16, 32, proj_size=4))


@every_kind
def test_dropout_between_layers(dense_kind, kind):
    layer = kind(8, 16, 2, dropout=0.5, block_size=(8, 2), density=0.5)
    x = torch.randn(4, 3, 8)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@every_kind
def test_errors(dense_kind, kind):
    layer = kind(8, 16, block_size=(8, 2))
    name = kind.__name__
    for input in (torch.randn(3, 2, 7), torch.randn(8), torch.randn(1, 1, 1, 8)):
        with pytest.raises(ValueError, match=rf"{name}: expected input of shape \(time, \[batch,\] 8\)"):
            layer(input)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 8)])
    with pytest.raises(ValueError, match="but got a PackedSequence"):
        layer(packed)
    with pytest.raises(ValueError, match="at least one step"):
        layer(torch.randn(0, 2, 8))
    state = torch.zeros(1, 3, 16)
    with pytest.raises(ValueError, match=r"expected a state of \d x the shape \(1, 2, 16\), but got \[\(1, 3, 16\)"):
        layer(torch.randn(3, 2, 8), state if kind is BlockSparseGRU else (state, state))
    with pytest.raises(ValueError, match="to be a multiple of the block's 16"):
        kind(8, 13)
    with pytest.raises(ValueError, match="num_layers must be greater than zero"):
        kind(8, 16, 0)
    with pytest.raises(ValueError, match="expected a state of"):
        layer(torch.randn(3, 2, 8), [torch.zeros(1, 2, 16)] * 3)


@every_kind
@pytest.mark.parametrize("batch", [0, 3])
def test_vmap(batch, dense_kind, kind):
    """Over inputs in one call, and over an ensemble."""
    layer = kind(8, 16, 2, bidirectional=True, block_size=(8, 2), density=0.4)
    x = torch.randn(batch, 5, 2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's fallback warns
        mapped = torch.vmap(lambda x: layer(x)[0])(x)
    assert mapped.shape == (batch, 5, 2, 32)
    assert_close(mapped, torch.stack([layer(each)[0] for each in x]) if batch else mapped)
    stacked = torch.func.stack_module_state([layer, kind(8, 16, 2, bidirectional=True, block_size=(8, 2), density=0.4)])
    parameters, buffers = ({name: t[: min(batch, 2)] for name, t in state.items()} for state in stacked)
    call = torch.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), (torch.ones(5, 2, 8),))[0])
    ensemble = call(parameters, buffers)
    assert ensemble.shape == (min(batch, 2), 5, 2, 32)
    assert_close(ensemble[:1], layer(torch.ones(5, 2, 8))[0].unsqueeze(0)[: min(batch, 1)])


@every_kind
def test_half_types_and_autocast(dense_kind, kind):
    layer = kind(16, 32, block_size=(16, 4), density=0.3)
    x = torch.randn(4, 2, 16)
    expected = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x)[0].float(), expected, rtol=0.05, atol=0.05)
    halves = layer.to(torch.bfloat16)(x.to(torch.bfloat16))[0]
    assert halves.dtype == torch.bfloat16
    assert_close(halves.float(), expected, rtol=0.05, atol=0.05)


@every_kind
def test_compile_and_export(dense_kind, kind):
    layer, x = kind(16, 32, block_size=(16, 4), density=0.3).eval(), torch.randn(3, 2, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(flat(compiled(x)), flat(layer(x)))
    program = torch.export.export(layer, (x,))
    assert_close(flat(program.module()(x)), flat(layer(x)))
