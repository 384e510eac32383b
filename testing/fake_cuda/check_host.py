"""Tests of the CUDA host code that need the fake device: run by tests/test_fake_device.py, with each library.

The project's GPU tests, which run on the fake too, compare values. These check which calls are made, in what order and
on which device and stream.
"""

import itertools
import re
import threading

import pytest
import torch

import blockdiag
from fake_cuda.aten import fake
from reference import Problem, check, make

LT = blockdiag.build_info()["cuda_gemm"] != "cublas"
FUSED = blockdiag.build_info()["cuda_gemm"] == "fused"
GEMM = "cublasLtMatmul" if LT else "cublasGemmStridedBatchedEx"
EXECUTION_FAILED, INTERNAL_ERROR, NOT_SUPPORTED = 13, 14, 15  # of cublasStatus_t
only_lt = pytest.mark.skipif(not LT, reason="of cuBLASLt alone")
only_cublas = pytest.mark.skipif(LT, reason="of cuBLAS alone")

SWITCHES = [
    *(
        "lazy",
        "dry",
        "malloc_after",
        "gemm_status",
        "matmul_status",
        "heuristic_status",
        "heuristic_limit",
        "heuristic_first",
    ),
    *("cost_21", "cost_31", "cost_66", "mute_21", "mute_66"),
]


@pytest.fixture(autouse=True)
def _reset():
    yield
    torch.cuda.synchronize()
    for name in SWITCHES:
        fake.set(name, 0)


# A problem of this test only: its plan is not cached yet.
_fresh = itertools.count(1)


def problem() -> Problem:
    return Problem((6,), 3, 5 + 6 * next(_fresh), 4)


def calls(function) -> list[str]:
    """The names of the calls that `function` puts on the device, in order."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would add a call
    fake.clear()
    function()
    torch.utils.deterministic.fill_uninitialized_memory = True
    names = [entry.split(" ")[0] for entry in fake.log()]
    return [name for name in names if name not in ("cudaMalloc", "cudaStreamSynchronize")]


def operands(problem: Problem, bias: str | None = "flat", dtype=torch.float32, device="cuda"):
    made = make(problem, dtype, device, bias=bias)
    return [tensor for tensor in made if tensor is not None]


def gradients(output, tensors, grad_output):
    return torch.autograd.grad(output, tensors, grad_output, retain_graph=True)


# Calls


@pytest.mark.parametrize("bias", [None, "flat", "stacked"])
def test_forward_is_one_gemm(bias):
    tensors = operands(Problem((6,), 3, 5, 4), bias)
    blockdiag.linear(*tensors)
    before = ["aten::copy_"] if bias and not LT else []
    assert calls(lambda: blockdiag.linear(*tensors)) == [*before, GEMM]


def test_backward_is_two_gemms():
    """The second may also sum the bias's gradient, but not in an undocumented order where the order matters."""
    tensors = operands(Problem((6,), 3, 5, 4))
    output = blockdiag.linear(*tensors)
    grad_output = torch.randn_like(output)
    for some in (tensors, tensors[1:2]):
        gradients(output, some, grad_output)
    separate = [GEMM, GEMM, "aten::sum.dim_IntList"]
    assert calls(lambda: gradients(output, tensors, grad_output)) == separate[: 2 if FUSED else 3]
    torch.use_deterministic_algorithms(True)
    try:
        gradients(output, tensors, grad_output)
        assert calls(lambda: gradients(output, tensors, grad_output)) == separate
    finally:
        torch.use_deterministic_algorithms(False)
    assert calls(lambda: gradients(output, tensors[:1], grad_output)) == [GEMM]
    assert calls(lambda: gradients(output, tensors[1:2], grad_output)) == [GEMM]


@pytest.mark.skipif(FUSED, reason="casts by itself")
def test_autocast_casts():
    """None of our kernels, which have not run on a GPU."""
    tensors = operands(Problem((6,), 3, 5, 4))
    with torch.autocast("cuda"):
        output = blockdiag.linear(*tensors)
        gradients(output, tensors, torch.randn_like(output))
        seen = calls(lambda: gradients(blockdiag.linear(*tensors), tensors, torch.randn_like(output)))
    assert GEMM in seen
    assert "kernel" not in seen


@pytest.mark.skipif(not FUSED, reason="autocast casts")
def test_autocast_casts_at_once():
    """The float32 operands of each product in one launch, and no gradient."""
    tensors = operands(Problem((6,), 3, 5, 4))

    def forward():
        with torch.autocast("cuda"):
            return blockdiag.linear(*tensors)

    grad_output = torch.randn_like(forward())
    gradients(forward(), tensors, grad_output)
    seen = calls(lambda: gradients(forward(), tensors, grad_output))
    assert seen == ["kernel", GEMM, "kernel", GEMM, "kernel", GEMM]
    tensors[0] = tensors[0].detach().half().requires_grad_()
    gradients(forward(), tensors, grad_output)
    seen = calls(lambda: gradients(forward(), tensors, grad_output))
    assert seen == ["kernel", GEMM, "kernel", GEMM, GEMM]


def test_one_block_is_no_batch():
    x, weight = operands(Problem((6,), 1, 5, 4), None)
    blockdiag.linear(x, weight)
    assert calls(lambda: blockdiag.linear(x, weight)) == [GEMM if LT else "cublasGemmEx"]


def test_more_blocks_than_a_grid_holds():
    """Two calls of cuBLAS; cuBLASLt is not asked."""
    x, weight = operands(Problem((2,), 70000, 1, 2), None)
    fake.clear()
    blockdiag.linear(x, weight)
    batches = re.findall(r"batch=(\d+)", "\n".join(fake.log()))
    assert batches == ["65535", "4465"]


@only_lt
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_types_that_cublaslt_is_not_asked_about(dtype):
    tensors = operands(Problem((6,), 3, 5, 4), dtype=dtype)
    assert calls(lambda: blockdiag.linear(*tensors)) == ["aten::copy_", "cublasGemmStridedBatchedEx"]


@pytest.mark.parametrize("size", ["batch", "num_blocks", "in_block", "out_block"])
def test_sizes_of_zero_reach_no_library(size):
    fields = {"batch": (6,), "num_blocks": 3, "in_block": 5, "out_block": 4, size: (0,) if size == "batch" else 0}
    tensors = operands(Problem(**fields))
    output = blockdiag.linear(*tensors)
    grad_output = torch.randn_like(output)
    seen = calls(lambda: (blockdiag.linear(*tensors), gradients(output, tensors, grad_output)))
    assert not [name for name in seen if name.startswith("cublas")]


@only_lt
def test_heuristic_is_asked_once():
    first = problem()
    tensors = operands(first)
    assert "cublasLtMatmulAlgoGetHeuristic" in calls(lambda: blockdiag.linear(*tensors))
    others = operands(first)
    assert calls(lambda: blockdiag.linear(*others)) == [GEMM]


@pytest.mark.parametrize("deterministic", [False, True])
def test_small_blocks_are_one_kernel_a_pass(deterministic):
    """The gradient of the bias comes with the weight's."""
    before = blockdiag.backends.cuda.preferred_blas_library()
    blockdiag.backends.cuda.preferred_blas_library("small_blocks")
    torch.use_deterministic_algorithms(deterministic)
    try:
        tensors = operands(Problem((6,), 3, 16, 32), dtype=torch.float16)
        output = check(blockdiag.linear, *tensors, grad_output=torch.randn(6, 96, dtype=torch.float16, device="cuda"))
        assert calls(lambda: blockdiag.linear(*tensors)) == ["run_small_blocks"]
        assert calls(lambda: gradients(output, tensors, output.detach())) == ["run_small_blocks"] * 2
        assert "bias_grad=1" in fake.log()[-1]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        blockdiag.linear(*tensors)
        end.record()
        end.synchronize()
        assert start.elapsed_time(end) > 0  # a benchmark divides by it
        large = operands(Problem((6,), 3, 65, 65), dtype=torch.float16)
        assert "run_small_blocks" not in calls(lambda: check(blockdiag.linear, *large))
    finally:
        blockdiag.backends.cuda.preferred_blas_library(before)


# Places


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex128], ids=str)
def test_any_alignment(dtype):
    """Operands that start at any element: no algorithm is told of a larger alignment, nor reused for a smaller one."""
    here = Problem((7,), 3, 8, 16)
    shapes = [here.input_shape(False), here.weight_shape, (3 * 16,)]
    for offsets in itertools.product([0, 1, 2, 8], repeat=3):
        tensors = []
        for shape, offset in zip(shapes, offsets, strict=True):
            count = torch.Size(shape).numel()
            tensors.append(torch.randn(count + offset, dtype=dtype, device="cuda")[offset:].view(shape))
        check(torch.ops.blockdiag.linear, *tensors)


def test_threads_with_streams_of_their_own():
    problems = [Problem((5 + i,), 1 + i % 3, 7, 6) for i in range(6)]
    expected = []
    for each in problems:
        tensors = [tensor.detach() for tensor in operands(each)]
        expected.append((tensors, blockdiag.linear(*tensors)))
    torch.cuda.synchronize()
    failures = []

    def work():
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(20):
                    for tensors, output in expected:
                        actual = blockdiag.linear(*tensors)
                        torch.cuda.current_stream().synchronize()
                        assert torch.equal(actual, output)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_work_waits_in_the_current_stream():
    """Forward and backward run on the current stream, and on no other."""
    here = Problem((6,), 3, 5, 4)
    tensors = [tensor.detach() for tensor in operands(here)]
    expected = blockdiag.linear(*tensors)
    torch.cuda.synchronize()
    fake.set("lazy", 1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = [
            blockdiag.linear(*tensors),
            torch.ops.blockdiag.linear_input_grad(expected, tensors[1], tensors[0].shape),
            torch.ops.blockdiag.linear_weight_grad(expected, tensors[0], tensors[1].shape),
        ]
    torch.cuda.current_stream().synchronize()
    assert not stream.query()
    stream.synchronize()
    assert stream.query()
    fake.set("lazy", 0)
    torch.testing.assert_close(results[0], expected, rtol=0, atol=0)
    assert all(tensor.isfinite().all() for tensor in results)


def test_tensors_of_another_device_than_the_current():
    """The fake refuses a handle, a stream, an algorithm or memory of another device."""
    here = Problem((6,), 3, 5, 4)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        tensors = operands(here, device=device)
        check(blockdiag.linear, *tensors, grad_output=torch.randn(6, 12, device=device))
        assert torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        check(blockdiag.linear, *operands(here), grad_output=torch.randn(6, 12, device="cuda"))
    x, weight = (tensor.detach() for tensor in operands(here, None))
    with pytest.raises(RuntimeError, match="expected weight to be on input's device cuda:0, but got cuda:1"):
        blockdiag.linear(x, weight.to("cuda:1"))


@pytest.mark.parametrize("first", [0, 1], ids=["no workspace", "workspace"])
def test_graph_without_a_first_run(first):
    """Plans are made, and workspaces allocated, while the stream is captured; replays compute on new values."""
    fake.set("heuristic_first", first)
    tensors = [tensor.detach() for tensor in operands(problem())]
    blockdiag.linear(*(tensor.detach() for tensor in operands(Problem((6,), 3, 5, 4))))  # creates the handle
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = blockdiag.linear(*tensors)
    for _ in range(2):
        tensors[0].normal_()
        assert calls(graph.replay) == ["cudaGraphLaunch"]
        torch.testing.assert_close(output, blockdiag.linear(*tensors), rtol=0, atol=0)


def test_more_than_two_to_the_31_elements_are_read():
    """Offsets beyond 32 bits. Untouched memory costs nothing: the rows before the last ones are zeros."""
    torch.use_deterministic_algorithms(False)  # they would be filled
    rows, num_blocks, in_block = 2**17 + 64, 2, 8192 + 64
    x = torch.empty(rows, num_blocks * in_block, dtype=torch.float16, device="cuda")
    x[-64:] = torch.randn(64, num_blocks * in_block)
    weight = torch.randn(num_blocks, 1, in_block, dtype=torch.float16, device="cuda")
    assert x.numel() > 2**31
    output = blockdiag.linear(x, weight)
    torch.testing.assert_close(output[-64:], blockdiag.linear(x[-64:].clone(), weight), rtol=1e-2, atol=1e-2)


def test_more_than_two_to_the_31_elements_are_written():
    """Not computed, which would take 4 GiB; the fake checks that only the output would be written."""
    torch.use_deterministic_algorithms(False)
    rows, num_blocks, out_block = 2**17, 2, 8192 + 64
    x = torch.zeros(rows, num_blocks, dtype=torch.float16, device="cuda")
    weight = torch.zeros(num_blocks, out_block, 1, dtype=torch.float16, device="cuda")
    fake.set("dry", 1)
    assert blockdiag.linear(x, weight).numel() > 2**31
