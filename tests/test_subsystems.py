"""The layer in parts of PyTorch without a test file of their own."""

import itertools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from blockdiag import BlockDiagLinear, PermutedBlockDiagLinear


@pytest.fixture
def layer(device):
    return BlockDiagLinear(12, 20, 4, device=device)


@pytest.fixture
def x(device):
    return torch.randn(5, 12, device=device, requires_grad=True)


def test_flops_are_counted(layer, x):
    """As for linear layers of the blocks: 2 B G K N each for the forward, the input's gradient and the weight's."""
    blocks = layer.to_linears()
    with FlopCounterMode(display=False) as loop:
        torch.cat([block(part) for block, part in zip(blocks, x.chunk(4, -1), strict=True)], -1).sum().backward()
    with FlopCounterMode(display=False) as ours:
        layer(x).sum().backward()
    assert ours.get_total_flops() == loop.get_total_flops() == 3 * 2 * 5 * 4 * 3 * 5
    with FlopCounterMode(display=False) as both:
        torch.ops.blockdiag.linear_weight_bias_grad(layer(x), x, layer.weight.shape)
    assert both.get_total_flops() == 2 * 2 * 5 * 4 * 3 * 5


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
def test_selective_checkpointing(policy, layer, x):
    """A policy sees the op, and saved results are not recomputed."""
    seen = []

    def choose(context, op, *args, **kwargs):
        seen.append((op, context.is_recompute))
        return policy if op == torch.ops.blockdiag.linear.default else CheckpointPolicy.PREFER_RECOMPUTE

    def context():
        return create_selective_checkpoint_contexts(choose)

    with FlopCounterMode(display=False) as counter:
        checkpoint(lambda x: layer(x).relu(), x, use_reentrant=False, context_fn=context).sum().backward()
    assert (torch.ops.blockdiag.linear.default, False) in seen
    forwards = 1 if policy == CheckpointPolicy.MUST_SAVE else 2
    assert counter.get_total_flops() == (2 + forwards) * 2 * 5 * 4 * 3 * 5


def test_jagged_inputs(layer, device):
    """The batch may be ragged: (B, *, in_features) with torch.jagged layout."""
    parts = [torch.randn(length, 12, device=device) for length in (3, 0, 5)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    output = layer(nested)
    for actual, part in zip(output.unbind(), parts, strict=True):
        torch.testing.assert_close(actual, layer(part))
    output.values().sum().backward()
    expected = layer.weight.sum(1).flatten().expand(8, 12)
    torch.testing.assert_close(nested.grad.values(), expected)


def test_jagged_inputs_keep_what_is_known_of_their_lengths(layer, device):
    nested = torch.nested.nested_tensor([torch.randn(n, 12, device=device) for n in (3, 5)], layout=torch.jagged)
    assert layer(nested)._maybe_max_seqlen == torch.nn.Linear(12, 4, device=device)(nested)._maybe_max_seqlen


def test_jagged_inputs_that_are_not_rows_one_after_the_other(layer, device):
    transposed = torch.nested.nested_tensor(
        [torch.randn(n, 3, 12, device=device) for n in (1, 2)], layout=torch.jagged
    ).transpose(1, 2)
    with pytest.raises(NotImplementedError, match="ragged in dimension 1, but it is in 2: transpose it back"):
        layer(transposed)
    values = torch.randn(2, 9, 12, device=device)
    holes = torch.nested.narrow(values, 1, *torch.tensor([[0, 4], [2, 3]], device=device), layout=torch.jagged)
    with pytest.raises(NotImplementedError, match=r"holes between them: call .contiguous\(\) first"):
        layer(holes)
    for part, expected in zip(layer(holes.contiguous()).unbind(), (values[0, :2], values[1, 4:7]), strict=True):
        torch.testing.assert_close(part, layer(expected))


@pytest.mark.parametrize(
    ("convert", "workaround"),
    [
        (torch.Tensor.to_sparse, "to_dense"),
        (torch.Tensor.to_sparse_csr, "to_dense"),
        (torch.Tensor.to_mkldnn, "to_dense"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "dequantize"),
        (lambda x: torch.nested.nested_tensor([x, x[:2]], layout=torch.strided), "torch.jagged"),
    ],
    ids=["sparse", "csr", "mkldnn", "quantized", "nested"],
)
def test_other_layouts_are_refused(convert, workaround):
    blocks, x = BlockDiagLinear(12, 20, 4), torch.randn(5, 12)
    permuted = PermutedBlockDiagLinear(12, 20, 4, list(range(11, -1, -1)), list(range(19, -1, -1)))
    for layer, requires_grad in itertools.product((permuted, blocks), (False, True)):
        layer.requires_grad_(requires_grad)
        with pytest.raises(NotImplementedError, match=f"blockdiag::linear: expected dense strided.*{workaround}"):
            layer(convert(x))
    with pytest.raises(NotImplementedError, match="to_dense"):
        torch.ops.blockdiag.linear(x, layer.weight.detach().to_sparse())


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision(precision):
    """On a CPU, float32 products stay float32, whatever torch.set_float32_matmul_precision allows."""
    layer, x = BlockDiagLinear(4 * 256, 4 * 256, 4), torch.randn(64, 4 * 256)
    expected = layer.double()(x.double()).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        torch.testing.assert_close(layer.float()(x), expected)
    finally:
        torch.set_float32_matmul_precision(before)


def test_torchscript(layer, x):
    traced = torch.jit.trace(layer, x)
    torch.testing.assert_close(traced(x[:3]), layer(x[:3]))
    frozen = torch.jit.freeze(traced.eval())
    torch.testing.assert_close(frozen(x), layer(x))
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


def test_offloaded_activations_and_anomaly_mode(layer, x):
    expected = torch.autograd.grad(layer(x).sin().sum(), [x, layer.weight])
    with torch.autograd.graph.save_on_cpu(), torch.autograd.detect_anomaly(check_nan=True):
        actual = torch.autograd.grad(layer(x).sin().sum(), [x, layer.weight])
    torch.testing.assert_close(actual, expected)


def test_construction_elsewhere(device):
    assert torch.nn.utils.skip_init(BlockDiagLinear, 12, 20, 4, device=device).weight.device.type == device
    with torch.device("meta"):
        assert BlockDiagLinear(12, 20, 4).weight.is_meta
    torch.set_default_dtype(torch.float64)
    try:
        assert BlockDiagLinear(12, 20, 4).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_parametrizations(layer, x):
    normalized = torch.nn.utils.parametrizations.weight_norm(layer, "weight", dim=0)
    normalized(x).sum().backward()
    assert all(parameter.grad is not None for parameter in normalized.parameters())


def test_grad_scaler_skips_an_overflowing_step(layer, x, device):
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16)
    before = layer.weight.detach().clone()
    for loss_scale, moves in ((1e30, False), (1.0, True)):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = layer(x).float().square().mean() * loss_scale
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) != moves


class Tagged(torch.Tensor):
    """A subclass that keeps its type through every function, as torch.Tensor's default does."""


def test_modes_and_subclasses(layer, x):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    op, seen = torch.ops.blockdiag.linear, []

    class FunctionMode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class DispatchMode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    expected = layer(x)
    with FunctionMode():
        torch.testing.assert_close(layer(x), expected)
    assert op in seen
    with DispatchMode():
        layer(x).sum().backward()
    backward = [torch.ops.blockdiag.linear_input_grad.default, torch.ops.blockdiag.linear_weight_bias_grad.default]
    assert {op.default, *backward} <= set(seen)
    output = layer(x.detach().as_subclass(Tagged))
    assert type(output) is Tagged
    torch.testing.assert_close(output.as_subclass(torch.Tensor), expected)
