"""Tests that need a GPU, or a build with CUDA."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import blockdiag
from conftest import require_cuda, require_cuda_build
from reference import Problem, check, make

OPS = ["linear", "linear_input_grad", "linear_weight_grad"]


class TestBuild:
    """Needs a build with CUDA, but no GPU."""

    @pytest.fixture(autouse=True)
    def _require_cuda_build(self):
        require_cuda_build()

    @pytest.mark.parametrize("op", OPS)
    def test_has_cuda_kernels(self, op):
        table = torch._C._dispatch_dump(f"blockdiag::{op}")
        cuda = [line for line in table.splitlines() if line.startswith("CUDA:")]
        assert len(cuda) == 1
        assert "cuda/linear.cpp" in cuda[0]

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_traces_on_fake_cuda_tensors(self, dtype):
        """Forward and both gradients; the autograd engine does not start for CUDA tensors without a GPU."""
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
        """Enables autocast as torch.autocast does, which refuses without a GPU."""
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

    @pytest.mark.parametrize("gemm", ["", "cublas", "cublaslt", "fused", "small_blocks", "fastest"])
    def test_choice_of_gemm(self, gemm):
        # Even if the variable is set for all tests.
        environment = {name: value for name, value in os.environ.items() if name != "BLOCKDIAG_CUDA_GEMM"}
        environment |= {"BLOCKDIAG_CUDA_GEMM": gemm} if gemm else {}
        command = [sys.executable, "-c", "import blockdiag; print(blockdiag.build_info()['cuda_gemm'])"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if gemm == "fastest":
            assert (
                'expected BLOCKDIAG_CUDA_GEMM to be one of [cublas, cublaslt, fused, small_blocks], but got "fastest"'
                in result.stderr
            )
        else:
            assert result.stdout.strip() == (gemm or "cublaslt"), result.stderr


# In a separate process, to count its calls. `bias[1:]` is not aligned to eight bytes.
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
        try:
            actual = torch.ops.blockdiag.linear(*cast)
        except RuntimeError as error:  # what is left to cuBLAS where sums must not be split
            assert "expected allow_splitk=True" in str(error)
            continue
        torch.testing.assert_close(actual.double(), expected, rtol=0.05, atol=0.3)
print(blockdiag.build_info()["cublaslt"])
"""

# The error or warnings of a call in deterministic mode, with each library. Without CUBLAS_WORKSPACE_CONFIG some
# versions of torch treat cuBLAS as nondeterministic.
_DETERMINISTIC = """
import torch, blockdiag, warnings

def outcome(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except RuntimeError as error:
            return type(error)
    return [each.category for each in caught]

x, w, b = (torch.randn(s, device="cuda", dtype=torch.float16) for s in ((32, 3 * 16), (3, 8, 16), (24,)))
for warn_only in (False, True):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    theirs = outcome(lambda: torch.nn.functional.linear(x, w.view(8, 48), b[:8]))
    for library in ("cublas", "cublaslt", "fused", "small_blocks"):
        blockdiag.backends.cuda.preferred_blas_library(library)
        ours = outcome(lambda: blockdiag.linear(x, w, b))
        assert ours == theirs, (warn_only, library, ours, theirs)
"""


@pytest.fixture(params=["cublas", "cublaslt", "tuned", "fused", "small_blocks"])
def gemm(request):
    """Each GPU library in turn."""
    before = blockdiag.backends.cuda.preferred_blas_library()
    blockdiag.backends.cuda.preferred_blas_library("cublaslt" if request.param == "tuned" else request.param)
    with blockdiag.backends.tune() if request.param == "tuned" else nullcontext():
        yield request.param
    blockdiag.backends.cuda.preferred_blas_library(before)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.cuda
class TestDevice:
    @pytest.fixture(autouse=True)
    def _require_gpu(self):
        require_cuda()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_torchs_own_flags(self, gemm, dtype):
        """Reduced precision as torch allows it, without the deterministic mode of the other tests."""
        matmul = torch.backends.cuda.matmul
        matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = True
        torch.use_deterministic_algorithms(False)
        tensors = make(Problem((1000,), 4, 64, 96), dtype, "cuda")
        grad_output = torch.randn(1000, 4 * 96, dtype=dtype, device="cuda")
        wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
        expected = torch.einsum("bgk,gnk->bgn", wide[0].view(1000, 4, 64), wide[1]).flatten(1) + wide[2]
        expected_grads = torch.autograd.grad(expected, wide, grad_output.double())
        for _ in range(2):
            output = blockdiag.linear(*tensors)
            results = [output, *torch.autograd.grad(output, tensors, grad_output)]
            for actual, exact in zip(results, [expected, *expected_grads], strict=True):
                assert relative_error(actual, exact) < 0.01

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("sizes", [(1, 64, 33), (1, 32, 128), (7, 24, 16), (3, 65, 70), (5, 1, 9)], ids=str)
    def test_bias_gradient(self, sizes, dtype, gemm):
        """For gradients of every layout; not in deterministic mode, which excludes cuBLASLt."""
        torch.use_deterministic_algorithms(False)
        num_blocks, in_block, out_block = sizes
        for stacked in (False, True):
            tensors = make(Problem((100,), num_blocks, in_block, out_block), dtype, "cuda", stacked=stacked)
            output = blockdiag.linear(*tensors)
            rows = torch.randn_like(output)
            columns = rows.flatten(1).mT.contiguous().mT.view(rows.shape) if not stacked else rows.mT.contiguous().mT
            for grad_output in (rows, rows[:1].expand_as(rows), columns):
                _, weight_grad, bias_grad = torch.autograd.grad(output, tensors, grad_output, retain_graph=True)
                dy = grad_output.double().view(100, num_blocks, out_block)
                x = tensors[0].detach().double().view(100, num_blocks, in_block)
                assert relative_error(weight_grad, torch.einsum("bgn,bgk->gnk", dy, x)) < 0.01
                assert relative_error(bias_grad, dy.sum(0).flatten()) < 0.01

    @pytest.mark.parametrize("allow", ["fp16", "bf16"])
    def test_sums_that_must_not_be_split(self, gemm, allow):
        """cuBLAS cannot avoid it and raises, as torch's own products do."""
        dtype = torch.float16 if allow == "fp16" else torch.bfloat16
        input, weight, bias = make(Problem((64,), 4, 64, 32), dtype, "cuda")
        setattr(torch.backends.cuda.matmul, f"allow_{allow}_reduced_precision_reduction", (False, False))
        if gemm == "cublas":
            with pytest.raises(RuntimeError, match=r"expected allow_splitk=True .*preferred_blas_library"):
                blockdiag.linear(input, weight, bias)
        else:
            try:
                check(blockdiag.linear, input, weight, bias)
            except RuntimeError as error:  # cuBLASLt may have no algorithm without splits
                if "expected allow_splitk=True" not in str(error):
                    raise

    def test_threads_with_streams_of_their_own(self, gemm):
        """Threads share plans, but not results."""

        def work(seed: int) -> bool:
            generator = torch.Generator("cuda").manual_seed(seed)
            with torch.cuda.stream(torch.cuda.Stream()):
                for size in (16, 32, 48, 64) * 3:
                    shapes = [(64, 4 * size), (4, 32, size), (128,)]
                    x, w, b = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
                    expected = torch.einsum("bgk,gnk->bgn", x.view(64, 4, size), w).flatten(1) + b
                    if relative_error(blockdiag.linear(x, w, b), expected.double()) > 1e-5:
                        return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(8)))

    def test_deterministic_mode_without_a_workspace_config(self):
        """Behaves as F.linear does."""
        environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
        command = [sys.executable, "-c", _DETERMINISTIC]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr

    @pytest.mark.parametrize("reduced", [True, False, (False, False)], ids=str)
    def test_cublaslt_computes(self, reduced):
        """The heuristic has algorithms for ordinary problems, which might all fall back to cuBLAS silently.

        It may have none for some problems, above all if sums must not be split.
        """
        environment = {**os.environ, "BLOCKDIAG_CUDA_GEMM": "cublaslt"}
        command = [sys.executable, "-c", _LT.format(reduced=reduced)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        computed, left = map(int, re.findall(r"\d+", result.stdout))
        assert computed + left == 12
        assert computed >= 1, result.stdout

    def test_current_stream(self, gemm):
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
    def test_graph_capture_and_replay(self, num_blocks, dtype, gemm):
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

    def test_repeated_calls_are_bitwise_equal(self, gemm):
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
