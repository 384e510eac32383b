"""opcheck, torch.compile and other users of fake tensors."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import metrics
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import blockdiag
from blockdiag import BlockDiagLinear
from blockdiag.registration.layout import feature_dims
from reference import DTYPES, Problem, make, problem_id

OPS = torch.ops.blockdiag


def _views(tensor):
    """The tensor: contiguous, transposed and sliced."""
    yield tensor
    yield tensor.detach().mT.contiguous().mT.requires_grad_(tensor.requires_grad)
    yield torch.cat([tensor.detach()] * 2, -1)[..., : tensor.shape[-1]].requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requires_grad", [False, True], ids=["constant", "differentiable"])
@pytest.mark.parametrize("stacked", [False, True], ids=["concatenated", "stacked"])
@pytest.mark.parametrize("bias", [None, "flat", "stacked"])
def test_opcheck(bias, stacked, requires_grad, dtype, device):
    input, weight, bias = make(Problem((4,), 3, 2, 5), dtype, device, stacked=stacked, bias=bias)
    for tensor in (input, weight, bias):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    arguments = (input, weight) if bias is None else (input, weight, bias)
    opcheck(OPS.linear.default, arguments)
    grad_output = torch.randn_like(OPS.linear(*arguments)).requires_grad_(requires_grad)
    opcheck(OPS.linear_input_grad.default, (grad_output, weight, list(input.shape)))
    opcheck(OPS.linear_weight_grad.default, (grad_output, input, list(weight.shape)))
    opcheck(OPS.linear_weight_bias_grad.default, (grad_output, input, list(weight.shape)))


@pytest.mark.parametrize(
    "problem", [Problem((4,), 3, 2, 5), Problem((2, 3), 2, 4, 1), Problem((4,), 1, 3, 2)], ids=problem_id
)
def test_opcheck_strided(problem, device):
    input, weight, bias = make(problem, torch.float32, device, stacked=True)
    for strided_input in _views(input):
        for strided_weight in _views(weight):
            opcheck(OPS.linear.default, (strided_input, strided_weight, bias))


def test_fake_and_real_outputs_agree(device):
    """Sizes, strides, dtype and device, for inputs of every layout."""
    input, weight, bias = make(Problem((4, 2), 3, 2, 5), torch.float32, device, stacked=True)
    for strided_input in _views(input):
        real = blockdiag.linear(strided_input, weight, bias)
        with FakeTensorMode() as mode:
            fake = blockdiag.linear(*(mode.from_tensor(t) for t in (strided_input, weight, bias)))
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
        assert fake.device == real.device


class Net(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.first = BlockDiagLinear(12, 24, 3, device=device)
        self.second = BlockDiagLinear(24, 6, 3, bias=False, device=device)

    def forward(self, x):
        return self.second(torch.relu(self.first(x) * 2))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_one_graph_for_all_batch_sizes(backend, device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    net = Net(device)
    compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
    for batch in (5, 7, 64, 3):
        x = torch.randn(batch, 12, device=device, requires_grad=True)
        expected = net(x)
        actual = compiled(x)
        torch.testing.assert_close(actual, expected)
        wanted = (x, *net.parameters())
        torch.testing.assert_close(
            torch.autograd.grad(actual.square().sum(), wanted), torch.autograd.grad(expected.square().sum(), wanted)
        )
    assert counter.frame_count == 1


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode, device):
    """Trains as without torch.compile, step by step, and runs in inference mode."""
    torch._dynamo.reset()
    net, expected = Net(device), Net(device)
    expected.load_state_dict(net.state_dict())
    compiled = torch.compile(net, mode=mode, fullgraph=True)
    x = torch.randn(8, 12, device=device)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, expected)]
    for _ in range(4):  # CUDA graphs are recorded in the second call, and replayed from the third on
        for model, optimizer in zip((compiled, expected), optimizers, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(net.state_dict(), expected.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), expected(x))


def test_neighbors_are_fused(device):
    """The pointwise functions before the op fuse into one kernel, those after it into another."""
    torch._dynamo.reset()
    metrics.reset()
    layer = BlockDiagLinear(12, 24, 3, device=device)
    with torch.no_grad():
        x = torch.randn(8, 12, device=device)
        actual = torch.compile(lambda x: (layer(x.sin() * 2).relu() + 1).exp(), fullgraph=True)(x)
        torch.testing.assert_close(actual, (layer(x.sin() * 2).relu() + 1).exp())
    assert metrics.generated_kernel_count == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_compiled_checkpointing_with_autocast(use_reentrant, device):
    torch._dynamo.reset()
    net = Net(device)

    def step(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=use_reentrant)

    x = torch.randn(8, 12, device=device, requires_grad=True)
    wanted = (x, *net.parameters())
    results = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        function(x).square().sum().backward()
        results.append([tensor.grad for tensor in wanted])
        for tensor in wanted:
            tensor.grad = None
    torch.testing.assert_close(*results)


def test_compile_default_settings_with_autocast(device):
    torch._dynamo.reset()
    net = Net(device)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return net(x)

    x = torch.randn(8, 12, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = net(x)
    actual = step(x)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected)


def test_compiled_autograd(device):
    torch._dynamo.reset()
    net = Net(device)
    x = torch.randn(8, 12, device=device)
    net(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in net.parameters()]
    net.zero_grad()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: net(x).square().sum().backward(), backend="aot_eager")()
    torch.testing.assert_close([parameter.grad for parameter in net.parameters()], expected)


def test_compiled_autograd_of_an_eager_forward_compiles_once_for_all_batch_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(BlockDiagLinear(8, 8, 2), nn.ReLU(), BlockDiagLinear(8, 8, 2))
    with compiled_autograd._enable(torch.compile(backend=counter, dynamic=True)):
        for batch in range(3, 9):
            for x in (torch.randn(batch, 8), torch.randn(batch, 2, 4)):
                model(x).sum().backward()
    assert counter.frame_count <= 4  # each kind of input once, and again when its batch size becomes symbolic


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["input", "weight", "bias"])
def test_compiled_forward_mode_with_symbolic_sizes(argument):
    weight, bias = torch.randn(2, 5, 3), torch.randn(10)

    def jacobian(x, weight, bias):
        return torch.func.jacfwd(blockdiag.linear, argument)(x, weight, bias)

    compiled = torch.compile(jacobian, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (4, 9):
        x = torch.randn(batch, 6)
        torch.testing.assert_close(compiled(x, weight, bias), jacobian(x, weight, bias))


def test_symbolic_sizes_keep_the_graph_general():
    """make_fx over symbolic shapes: the op stays one node, and the batch stays a symbol."""
    from torch.fx.experimental.proxy_tensor import make_fx

    input, weight, bias = (tensor.detach() for tensor in make(Problem((4,), 3, 2, 5), torch.float32, "cpu"))
    graph = make_fx(blockdiag.linear, tracing_mode="symbolic")(input, weight, bias)
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls.count(OPS.linear.default) == 1
    larger = torch.randn(9, 6)
    torch.testing.assert_close(graph(larger, weight, bias), blockdiag.linear(larger, weight, bias))


def test_data_dependent_sizes(device):
    """Batch and number of blocks known only at run time are checked then, not rejected while tracing."""
    torch._dynamo.reset()

    def select(x, weight, rows, count):
        blocks = count.item()
        torch._check(blocks >= 1)
        torch._check(blocks <= weight.shape[0])
        x = x[rows.nonzero().squeeze(1)]
        return OPS.linear(x[:, :blocks], weight[:blocks]), OPS.linear(x[:, :3], weight)

    x, weight = torch.randn(5, 4, 2, device=device), torch.randn(3, 6, 2, device=device)
    rows = torch.tensor([True, False, True, True, False], device=device)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(select, backend="aot_eager", fullgraph=True)
        for count in (2, 3):
            arguments = (x, weight, rows, torch.tensor(count))
            torch.testing.assert_close(compiled(*arguments), select(*arguments))


def test_export():
    net = Net("cpu").eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.randn(4, 12),), dynamic_shapes=({0: batch},))
    x = torch.randn(9, 12)
    torch.testing.assert_close(program.module()(x), net(x))
    decomposed = program.run_decompositions()  # the op has no decomposition
    torch.testing.assert_close(decomposed.module()(x), net(x))
    assert OPS.linear.default in {node.target for node in decomposed.graph.nodes}


def test_dynamo_tells_stacked_inputs_as_the_check_does(monkeypatch):
    """It cannot trace the check in C++, which decides how models that are compiled are sharded."""
    inputs = [(12,), (5, 12), (5, 4, 3), (2, 5, 4, 3), (4, 3), (3,), (1,), (5, 1), (4, 1), (5, 0), (4, 0), (5, 7)]
    weights = [(4, 2, 3), (1, 2, 3), (4, 2, 1), (1, 1, 1), (4, 2, 0), (0, 2, 3)]
    expected = [feature_dims(input, weight) for input in inputs for weight in weights]
    assert set(expected) == {1, 2}
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    assert [feature_dims(input, weight) for input in inputs for weight in weights] == expected
