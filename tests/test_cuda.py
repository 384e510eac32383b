"""What only a GPU, or a build with CUDA, can show."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import blockdiag
from conftest import require_cuda
from reference import Problem, check, make

OPS = ["linear", "linear_input_grad", "linear_weight_grad"]


class TestBuild:
    """Needs a build with CUDA, but no GPU. FAIL_WITHOUT_CUDA_BUILD=1 says that such a build is expected."""

    @pytest.fixture(autouse=True)
    def _require_cuda_build(self):
        if blockdiag.build_info()["cuda"] == "none":
            if os.environ.get("FAIL_WITHOUT_CUDA_BUILD") == "1":
                pytest.fail("FAIL_WITHOUT_CUDA_BUILD=1, but blockdiag was built without CUDA")
            pytest.skip("blockdiag was built without CUDA")

    @pytest.mark.parametrize("op", OPS)
    def test_has_cuda_kernels(self, op):
        table = torch._C._dispatch_dump(f"blockdiag::{op}")
        cuda = [line for line in table.splitlines() if line.startswith("CUDA:")]
        assert len(cuda) == 1
        assert "cuda/linear.cu" in cuda[0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_traces_on_fake_cuda_tensors(self, dtype):
        """Forward and both gradients; the autograd engine itself will not start for CUDA tensors without a GPU."""
        with FakeTensorMode():
            layer = blockdiag.BlockDiagLinear(256, 128, 4, device="cuda", dtype=dtype)
            x = torch.empty(32, 256, device="cuda", dtype=dtype)
            output = layer(x)
            input_grad = torch.ops.blockdiag.linear_input_grad(output, layer.weight, x.shape)
            weight_grad = torch.ops.blockdiag.linear_weight_grad(output, x, layer.weight.shape)
        assert output.shape == (32, 128)
        assert output.grad_fn is not None
        assert (input_grad.shape, weight_grad.shape) == (x.shape, layer.weight.shape)
        assert {(t.device.type, t.dtype) for t in (output, input_grad, weight_grad)} == {("cuda", dtype)}

    def test_autocasts_fake_cuda_tensors(self):
        """Switched on as torch.autocast does, which itself refuses to without a GPU."""
        before = torch.get_autocast_dtype("cuda")
        with FakeTensorMode():
            layer = blockdiag.BlockDiagLinear(256, 128, 4, device="cuda")
            x = torch.empty(32, 256, device="cuda", dtype=torch.float16)
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_enabled("cuda", True)
            try:
                assert layer(x).dtype == torch.bfloat16
            finally:
                torch.set_autocast_enabled("cuda", False)
                torch.set_autocast_dtype("cuda", before)

    def test_reports_cublas(self):
        assert blockdiag.build_info()["cublas"].startswith("built with ")

    @pytest.mark.parametrize("gemm", ["", "cublas", "cublaslt", "fastest"])
    def test_choice_of_gemm(self, gemm):
        environment = {name: value for name, value in os.environ.items() if name != "BLOCKDIAG_CUDA_GEMM"}
        if gemm:
            environment["BLOCKDIAG_CUDA_GEMM"] = gemm
        command = [sys.executable, "-c", "import blockdiag; print(blockdiag.build_info()['cuda_gemm'])"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if gemm == "fastest":
            assert 'expected BLOCKDIAG_CUDA_GEMM to be one of [cublas, cublaslt], but got "fastest"' in result.stderr
        else:
            assert result.stdout.strip() == (gemm or "cublas"), result.stderr


# In a process of its own: the choice is made once. `bias[1:]` starts where no vector of eight bytes does.
_LT = """
import torch, blockdiag
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = {reduced}
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    x, w, b = (torch.randn(s, dtype=torch.float64, device="cuda") for s in ((96, 4 * 64), (4, 32, 64), (4 * 32 + 1,)))
    for bias in (None, b[1:], b[:-1], b[1:]):
        cast = [None if t is None else t.to(dtype) for t in (x, w)] + [None if bias is None else b.to(dtype)]
        if bias is not None:
            cast[2] = cast[2][1:] if bias.data_ptr() != b.data_ptr() else cast[2][:-1]
        expected = torch.einsum("bgk,gnk->bgn", x.view(96, 4, 64), w).flatten(1) + (0 if bias is None else bias)
        torch.testing.assert_close(torch.ops.blockdiag.linear(*cast).double(), expected, rtol=0.05, atol=0.3)
print(blockdiag.build_info()["cublaslt"])
"""


@pytest.mark.cuda
class TestDevice:
    @pytest.fixture(autouse=True)
    def _require_gpu(self):
        require_cuda()

    @pytest.mark.parametrize("reduced", [True, False, (False, False)], ids=str)
    def test_cublaslt_computes(self, reduced):
        """What the heuristic says of ordinary problems: without this, all of them might be left to cuBLAS unseen."""
        environment = {**os.environ, "BLOCKDIAG_CUDA_GEMM": "cublaslt"}
        command = [sys.executable, "-c", _LT.format(reduced=reduced)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "12 calls, 0 left to cuBLAS"

    def test_current_stream(self):
        """Work queued on a side stream behind a slow kernel must see that kernel's result."""
        input, weight, bias = (t.detach() for t in make(Problem((512,), 8, 64, 64), torch.float32, "cuda"))
        expected = blockdiag.linear(input, weight, bias)
        late = torch.zeros_like(input)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            late.copy_(input)
            actual = blockdiag.linear(late, weight, bias)
        stream.synchronize()
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    def test_second_device(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        input, weight, bias = make(Problem((16,), 4, 8, 8), torch.float32, "cuda:1")
        with torch.cuda.device(0):
            check(torch.ops.blockdiag.linear, input, weight, bias, torch.randn(16, 32, device="cuda:1"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("num_blocks", [1, 4])
    def test_graph_capture_and_replay(self, num_blocks, dtype):
        """Forward and backward in one captured graph; replays compute on new data in the same memory."""
        input, weight, bias = make(Problem((64,), num_blocks, 32, 32), dtype, "cuda")
        grad_output = torch.randn(64, 32 * num_blocks, dtype=dtype, device="cuda")

        def step():
            output = blockdiag.linear(input, weight, bias)
            return (output, *torch.autograd.grad(output, (input, weight, bias), grad_output))

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            with torch.no_grad():
                for tensor in (input, weight, bias, grad_output):
                    tensor.normal_()
            graph.replay()
            torch.testing.assert_close(captured, step())

    def test_tf32_is_used_only_if_allowed(self):
        input, weight, _ = (
            t.detach() if t is not None else t
            for t in make(Problem((256,), 4, 512, 512), torch.float32, "cuda", bias=None)
        )
        exact = torch.einsum("bgk,gnk->bgn", input.double().view(256, 4, 512), weight.double()).flatten(1)

        def error():
            return ((blockdiag.linear(input, weight) - exact).norm() / exact.norm()).item()

        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            assert error() < 1e-6
            torch.set_float32_matmul_precision("high")
            assert 1e-5 < error() < 1e-2
        finally:
            torch.set_float32_matmul_precision(before)

    def test_repeated_calls_are_bitwise_equal(self):
        input, weight, bias = make(Problem((512,), 8, 128, 96), torch.float16, "cuda")
        grad_output = torch.randn(512, 8 * 96, dtype=torch.float16, device="cuda")
        runs = []
        for _ in range(3):
            output = blockdiag.linear(input, weight, bias)
            runs.append((output, *torch.autograd.grad(output, (input, weight, bias), grad_output)))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

    def test_more_than_two_to_the_31_elements(self):
        """Offsets beyond 32 bits: the last rows of a 2.2e9 element input, in half precision."""
        free, _ = torch.cuda.mem_get_info()
        if free < 16 << 30:
            pytest.skip("needs 16 GiB of free GPU memory")
        rows, num_blocks, in_block = 2**20 + 64, 2, 1024
        input = torch.randn(rows, num_blocks * in_block, dtype=torch.float16, device="cuda")
        weight = torch.randn(num_blocks, 4, in_block, dtype=torch.float16, device="cuda")
        output = blockdiag.linear(input, weight)
        torch.testing.assert_close(output[-64:], blockdiag.linear(input[-64:].clone(), weight), rtol=1e-2, atol=1e-2)
