"""float32 tensors beside those of a half type, by the ways to trace, map and export the op."""

import itertools

import pytest
import torch
from test_mixed_dtypes import HALVES, OPS, converts, mixed, under_autocast
from torch import nn
from torch._dynamo import compiled_autograd
from torch.library import opcheck

from blockdiag import BlockDiagLinear
from reference import Problem


@pytest.mark.parametrize(
    "in_dims", [d for d in itertools.product((None, 0), repeat=3) if any(x == 0 for x in d)], ids=str
)
def test_vmap(in_dims, device):
    """Over any of the tensors: the results of a loop, with the same dtypes, forward and backward."""
    half, count = torch.bfloat16, 3
    base = mixed(Problem((6,), 2, 3, 4), (half, torch.float32, torch.float32), device)
    tensors = [
        tensor.detach() if dim is None else torch.stack([torch.randn_like(tensor) for _ in range(count)])
        for tensor, dim in zip(base, in_dims, strict=True)
    ]

    def loss(*arguments):
        output = under_autocast(device, half, *arguments)
        return output.float().pow(2).sum(), output

    function = torch.func.grad(loss, argnums=(0, 1, 2), has_aux=True)
    grads, outputs = torch.vmap(function, in_dims=in_dims)(*tensors)
    for index in range(count):
        sample = [t if dim is None else t[index] for t, dim in zip(tensors, in_dims, strict=True)]
        expected_grads, expected = function(*sample)
        # Where the bias alone is mapped, it is added to a rounded product.
        torch.testing.assert_close(outputs[index], expected, rtol=2e-2, atol=2e-2)
        for got, want in zip(grads, expected_grads, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got[index], want, rtol=5e-2, atol=5e-1)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("out_dtype", ["half", "single"])
def test_opcheck(out_dtype, half, device):
    out_dtype = half if out_dtype == "half" else torch.float32
    input, weight, bias = mixed(Problem((4,), 3, 2, 5), (half, torch.float32, torch.float32), device)
    options = {"out_dtype": out_dtype}
    opcheck(OPS.linear.default, (input, weight, bias), options)
    grad_output = torch.randn(4, 15, device=device).to(out_dtype).requires_grad_()
    opcheck(OPS.linear_input_grad.default, (grad_output, weight, list(input.shape)), options)
    opcheck(OPS.linear_weight_grad.default, (grad_output, input, list(weight.shape)), options)
    opcheck(OPS.linear_weight_bias_grad.default, (grad_output, input, list(weight.shape)), options)


class Net(nn.Module):
    """Layers under autocast, whose input and parameters are float32."""

    def __init__(self, device, half):
        super().__init__()
        self.layers = nn.ModuleList(
            [BlockDiagLinear(12, 32, 4, device=device), BlockDiagLinear(32, 8, 4, device=device)]
        )
        self.half = half

    def forward(self, x):
        with torch.autocast(x.device.type, dtype=self.half):
            for layer in self.layers:
                x = layer(x).relu()
        return x.float()


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("compile_backward", [False, True], ids=["eager_backward", "compiled_autograd"])
def test_compile(compile_backward, half, device):
    net, x = Net(device, half), torch.randn(5, 12, device=device)
    compiled = torch.compile(net, fullgraph=True, dynamic=True)

    def gradients(model, backward):
        loss = model(x).pow(2).mean()
        if backward:
            with compiled_autograd._enable(torch.compile(backend="aot_eager")):
                loss.backward()
        else:
            loss.backward()
        grads = [parameter.grad for parameter in net.parameters()]
        net.zero_grad()
        return grads

    expected = gradients(net, False)
    actual = gradients(compiled, compile_backward)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(half).eps * want.abs().max().item())


def test_traced_graphs_have_no_casts(device):
    if not converts(device, torch.bfloat16):
        pytest.skip("autocast casts here")
    net = Net(device, torch.bfloat16)
    program = torch.export.export(net, (torch.randn(5, 12),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    program = program.run_decompositions({})
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names.count("blockdiag.linear.default") == 2
    assert sum("to_copy" in name or "to.dtype" in name for name in names) <= 1  # of the result
    for batch in (1, 7):
        x = torch.randn(batch, 12)
        torch.testing.assert_close(program.module()(x), net(x))


def test_onnx_of_one_dtype():
    """A tangent is computed with an out_dtype, which is no reason to leave float64."""
    onnxruntime = pytest.importorskip("onnxruntime")

    class Tangent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = BlockDiagLinear(12, 32, 4, dtype=torch.float64)

        def forward(self, x):
            return torch.func.jvp(self.layer, (x,), (x,))[1]

    model, x = Tangent().eval(), torch.randn(5, 12, dtype=torch.float64)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(actual), model(x).detach(), rtol=1e-12, atol=1e-12)


def test_onnx(device):
    onnxruntime = pytest.importorskip("onnxruntime")
    for half in HALVES:
        net, x = Net("cpu", half).eval(), torch.randn(5, 12)
        dynamic = ({0: torch.export.Dim("batch")},)
        program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
        if half == torch.bfloat16:
            continue  # onnxruntime's CPU provider has no ReLU for it
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        for batch in (1, 7):
            x = torch.randn(batch, 12)
            (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
            torch.testing.assert_close(torch.from_numpy(actual), net(x).detach(), rtol=1e-2, atol=1e-2)
