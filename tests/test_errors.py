"""Bad input raises one clear error, before any work, with the op, the expected and the actual value."""

import re

import pytest
import torch

import blockdiag
from blockdiag import BlockDiagLinear

DEVICES = ["cpu", "meta"]


def rejects(message, *arguments, error=RuntimeError, op=torch.ops.blockdiag.linear):
    with pytest.raises(error, match=re.escape(message)):
        op(*arguments)


@pytest.mark.parametrize("device", DEVICES)
class TestShapes:
    def test_wrong_trailing_size(self, device):
        weight = torch.empty(4, 32, 64, device=device)
        rejects(
            "blockdiag::linear: expected input's last dimension to be num_blocks * in_block = 4 * 64 = 256, "
            "but got 250",
            torch.empty(8, 250, device=device),
            weight,
        )
        rejects("= 4 * 64 = 256, but got 64", torch.empty(64, device=device), weight)

    def test_wrong_number_of_stacked_blocks(self, device):
        rejects(
            "blockdiag::linear: expected input's last two dimensions to be (num_blocks, in_block) = (4, 64), "
            "but got (3, 64)",
            torch.empty(8, 3, 64, device=device),
            torch.empty(4, 32, 64, device=device),
        )

    @pytest.mark.parametrize("shape", [(32, 64), (64,), (), (1, 4, 32, 64)])
    def test_weight_rank(self, shape, device):
        rejects(
            "blockdiag::linear: expected weight to have 3 dimensions (num_blocks, out_block, in_block), but got shape "
            f"[{', '.join(map(str, shape))}]",
            torch.empty(8, 256, device=device),
            torch.empty(shape, device=device),
        )

    def test_scalar_input(self, device):
        rejects(
            "blockdiag::linear: expected input to have at least 1 dimension, but got a scalar",
            torch.empty((), device=device),
            torch.empty(4, 32, 64, device=device),
        )

    @pytest.mark.parametrize("shape", [(127,), (32,), (1,), (32, 4), (1, 128), (4, 32, 1), ()])
    def test_bias_shape(self, shape, device):
        rejects(
            "blockdiag::linear: expected bias to have shape (num_blocks * out_block,) = (128,) or "
            f"(num_blocks, out_block) = (4, 32), but got shape [{', '.join(map(str, shape))}]",
            torch.empty(8, 256, device=device),
            torch.empty(4, 32, 64, device=device),
            torch.empty(shape, device=device),
        )

    def test_gradient_ops(self, device):
        ops = torch.ops.blockdiag
        weight, grad_output = torch.empty(4, 32, 64, device=device), torch.empty(8, 127, device=device)
        message = "expected grad_output to have the output's shape [8, 128], but got [8, 127]"
        rejects(f"blockdiag::linear_input_grad: {message}", grad_output, weight, [8, 256], op=ops.linear_input_grad)
        input = torch.empty(8, 256, device=device)
        rejects(f"blockdiag::linear_weight_grad: {message}", grad_output, input, [4, 32, 64], op=ops.linear_weight_grad)

    def test_sizes_whose_products_overflow(self, device):
        """No elements, but sizes whose product overflows 64 bits."""
        weight = torch.empty(2**62, 0, 4, device=device)
        rejects(
            "expected num_blocks to fit BLAS's 32-bit integers (2147483647), but got 4611686018427387904",
            torch.empty(2, 0, device=device),
            weight,
        )

    def test_sizes_beyond_blas(self, device):
        too_many = 2**31
        rows = torch.empty(1, 2, device=device).expand(too_many, 2)
        weight = torch.empty(2, 3, 1, device=device)
        limit = "to fit BLAS's 32-bit integers (2147483647), but got 2147483648"
        rejects(f"expected the batch size (the product of input's leading dimensions) {limit}", rows, weight)
        rejects(
            f"expected in_block {limit}",
            torch.empty(1, device=device).expand(too_many),
            torch.empty(1, 1, 1, device=device).expand(1, 1, too_many),
        )
        rejects(
            f"expected out_features (num_blocks * out_block) {limit}",
            torch.empty(2, device=device),
            torch.empty(1, 1, 1, device=device).expand(2, 2**30, 1),
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_unsupported_dtypes(dtype):
    name = str(dtype).removeprefix("torch.")
    rejects(
        "blockdiag::linear: expected input to be float16, bfloat16, float32, float64, complex64 or complex128, but got "
        f"{name}",
        torch.zeros(8, 6).to(dtype),
        torch.zeros(3, 4, 2).to(dtype),
    )


def test_mixed_dtypes():
    x, w, b = torch.randn(8, 6), torch.randn(3, 4, 2), torch.randn(12)
    rejects("blockdiag::linear: expected weight to have input's dtype float32, but got float64", x, w.double(), b)
    rejects("blockdiag::linear: expected bias to have input's dtype float32, but got float16", x, w, b.half())


def test_mixed_devices():
    x, w, b = torch.randn(8, 6), torch.randn(3, 4, 2), torch.randn(12)
    rejects("blockdiag::linear: expected weight to be on input's device cpu, but got meta", x, w.to("meta"), b)
    rejects("blockdiag::linear: expected bias to be on input's device cpu, but got meta", x, w, b.to("meta"))


def test_mixed_cuda_and_cpu(cuda):
    x, w = torch.randn(8, 6), torch.randn(3, 4, 2)
    rejects("expected weight to be on input's device cpu, but got cuda:0", x, w.to(cuda))
    rejects("expected weight to be on input's device cuda:0, but got cpu", x.to(cuda), w)


def test_unsupported_layouts():
    x, w = torch.randn(8, 6), torch.randn(3, 4, 2)
    rejects("blockdiag::linear", x.to_sparse(), w, error=NotImplementedError)
    rejects("blockdiag::linear", x, w.to_sparse(), error=NotImplementedError)


@pytest.mark.skipif(blockdiag.build_info()["cuda"] != "none", reason="this build has CUDA")
@pytest.mark.parametrize("name", ["linear", "linear_input_grad", "linear_weight_grad"])
def test_cuda_tensor_on_a_cpu_build(name):
    """Calls the kernel of the CUDA key as the dispatcher would for a CUDA tensor."""
    overload = getattr(torch.ops.blockdiag, name).default
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    third = {"linear": None, "linear_input_grad": [8, 6], "linear_weight_grad": [3, 4, 2]}[name]
    with pytest.raises(NotImplementedError, match=rf"blockdiag::{name}: .*for CPUs only.*FORCE_CUDA=1 pip install"):
        overload.redispatch(cuda, torch.randn(8, 6), torch.randn(3, 4, 2), third)


def test_module_sizes():
    def make(*sizes):
        return BlockDiagLinear(*sizes)

    message = "BlockDiagLinear: expected {} to be a multiple of num_blocks = 4, but got {}"
    rejects(message.format("in_features", 250), 250, 128, 4, error=ValueError, op=make)
    rejects(message.format("out_features", 130), 256, 130, 4, error=ValueError, op=make)
    rejects(message.format("in_features", -4), -4, 128, 4, error=ValueError, op=make)
    for num_blocks in (0, -1):
        message = f"BlockDiagLinear: expected num_blocks to be positive, but got {num_blocks}"
        rejects(message, 256, 128, num_blocks, error=ValueError, op=make)


def test_module_input():
    rejects("= 4 * 64 = 256, but got 255", torch.randn(2, 255), op=BlockDiagLinear(256, 128, 4))


def test_conversions():
    linear = torch.nn.Linear(6, 4)
    from_linears, from_dense = BlockDiagLinear.from_linears, BlockDiagLinear.from_dense
    rejects("expected at least one nn.Linear, but got none", [], error=ValueError, op=from_linears)
    for other in (
        torch.nn.Linear(6, 5),
        torch.nn.Linear(6, 4, bias=False),
        torch.nn.Linear(6, 4).double(),
        torch.nn.Linear(6, 4, device="meta"),
        torch.nn.Linear(6, 4).requires_grad_(False),
    ):
        rejects("expected every layer to be like the first", [linear, other], error=ValueError, op=from_linears)
    rejects("expected in_features to be a multiple of num_blocks = 4", linear, 4, error=ValueError, op=from_dense)


def test_a_failed_backward_leaves_gradients_as_they_were():
    layer = BlockDiagLinear(6, 4, 2)
    output = layer(torch.randn(3, 6))
    with pytest.raises(RuntimeError):
        output.backward(torch.randn(3, 5))
    assert layer.weight.grad is None
    assert layer.bias.grad is None
