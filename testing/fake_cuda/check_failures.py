"""Failing calls, and cuBLASLt without an algorithm or with a wrong one. Run by tests/test_fake_device.py."""

import re

import pytest
import torch

import blockdiag
from fake_cuda.aten import fake
from fake_cuda.check_host import (
    EXECUTION_FAILED,
    GEMM,
    INTERNAL_ERROR,
    LT,
    NOT_SUPPORTED,
    calls,
    gradients,
    only_cublas,
    only_lt,
    operands,
    problem,
)
from fake_cuda.check_host import _reset as _reset
from reference import Problem, check


@pytest.mark.parametrize("count", range(1, 6))
def test_every_allocation_may_fail(count):
    """The call works once memory is available again: a failure leaves no partial state."""
    fake.set("heuristic_first", 1)  # an algorithm with a workspace
    tensors = operands(Problem((60000 + count,), 3, 16, 16))  # 11 MiB: does not fit what other tensors left free

    def step(*tensors):
        output = blockdiag.linear(*tensors)
        return (output, *gradients(output, tensors, torch.ones_like(output)))

    torch.cuda.empty_cache()
    fake.set("malloc_after", count)
    failed = False
    try:
        step(*tensors)
    except torch.OutOfMemoryError:
        failed = True
    fake.set("malloc_after", 0)
    assert failed or count > 2
    expected = step(*(tensor.cpu() for tensor in tensors))
    torch.testing.assert_close([t.cpu() for t in step(*tensors)], [*expected], rtol=1e-3, atol=1e-3)


@only_cublas
@pytest.mark.parametrize(
    ("num_blocks", "function"), [(1, "cublasGemmEx"), (3, "cublasGemmStridedBatchedEx")], ids=["one", "batched"]
)
def test_error_of_cublas_names_status_and_shape(num_blocks, function):
    tensors = operands(Problem((6,), num_blocks, 5, 4), None)
    fake.set("gemm_status", EXECUTION_FAILED)
    with pytest.raises(RuntimeError) as error:
        blockdiag.linear(*tensors)
    expected = f"{function} returned CUBLAS_STATUS_EXECUTION_FAILED for a float32 GEMM of m = 4, n = 6, k = 5"
    assert expected in str(error.value)
    fake.set("gemm_status", 0)
    check(blockdiag.linear, *tensors)


@only_lt
@pytest.mark.parametrize(
    ("switch", "function"),
    [("matmul_status", "cublasLtMatmul"), ("heuristic_status", "cublasLtMatmulAlgoGetHeuristic")],
)
def test_error_of_cublaslt_names_status_and_shape(switch, function):
    fresh = problem()
    tensors = operands(fresh)
    fake.set(switch, INTERNAL_ERROR)
    with pytest.raises(RuntimeError) as error:
        blockdiag.linear(*tensors)
    expected = (
        f"{function} returned CUBLAS_STATUS_INTERNAL_ERROR for a float32 GEMM of m = 4, n = 6, k = {fresh.in_block}"
    )
    assert expected in str(error.value)
    fake.set(switch, 0)
    check(blockdiag.linear, *tensors)
    assert calls(lambda: blockdiag.linear(*tensors)) == [GEMM]


@only_lt
@pytest.mark.parametrize(
    ("switch", "value"), [("matmul_status", NOT_SUPPORTED), ("heuristic_status", NOT_SUPPORTED), ("heuristic_limit", 1)]
)
def test_what_cublaslt_cannot_do_is_left_to_cublas_and_counted(switch, value):
    def left() -> int:
        return int(re.search(r"(\d+) left to cuBLAS", blockdiag.build_info()["cublaslt"])[1])

    tensors = operands(problem())
    grad_output = torch.randn(6, 12, device="cuda")
    fake.set(switch, value)
    before = left()
    assert calls(lambda: blockdiag.linear(*tensors))[-2:] == ["aten::copy_", "cublasGemmStridedBatchedEx"]
    assert left() == before + 1
    check(blockdiag.linear, *tensors, grad_output=grad_output)


# Algorithms


def algorithm_of_forward(tensors) -> int:
    fake.clear()
    blockdiag.linear(*tensors)
    return int(re.search(r"algo=(\d+)", fake.log()[-1])[1])


@only_lt
@pytest.mark.parametrize(("first", "algorithm"), [(0, 21), (1, 31)])
def test_the_first_algorithm_is_taken(first, algorithm):
    """The second has a workspace."""
    fake.set("heuristic_first", first)
    tensors = operands(problem())
    check(blockdiag.linear, *tensors, grad_output=torch.randn(6, 12, device="cuda"))
    assert algorithm_of_forward(tensors) == algorithm


@only_lt
@pytest.mark.parametrize(("in_block", "algorithm"), [(512, 21), (513, 66)])
def test_an_algorithm_that_sums_wrongly_is_not_taken(in_block, algorithm):
    """The fake's algorithm 66 splits k into three parts, and skips the rest."""
    fake.set("heuristic_first", 2)
    tensors = operands(Problem((6,), 3, in_block, 4))
    check(blockdiag.linear, *tensors)
    assert algorithm_of_forward(tensors) == algorithm


@only_lt
@pytest.mark.parametrize(
    ("muted", "attribute", "first", "algorithm"), [(21, 0, 0, 31), (66, 2, 2, 21), (21, 2, 0, 21)], ids=str
)
def test_an_algorithm_without_an_attribute(muted, attribute, first, algorithm):
    """An algorithm without an ID is skipped, and so is a 66 without its number of splits; no call fails."""
    fake.set(f"mute_{muted}", attribute + 1)
    fake.set("heuristic_first", first)
    tensors = operands(problem())
    check(blockdiag.linear, *tensors)
    assert algorithm_of_forward(tensors) == algorithm


@only_lt
def test_no_split_sums_where_they_are_forbidden():
    fake.set("heuristic_first", 2)
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (False, False)
    tensors = operands(Problem((6,), 3, 48, 4), dtype=torch.bfloat16)
    assert algorithm_of_forward(tensors) == 21
    matmul.allow_bf16_reduced_precision_reduction = True
    torch.use_deterministic_algorithms(False)
    assert algorithm_of_forward(tensors) == 66


def test_events_tell_what_the_fake_is_told():
    """So that a test can make any algorithm the fastest."""
    tensors = operands(Problem((6,), 3, 5, 4), None)
    blockdiag.linear(*tensors)
    fake.set("cost_21", 700)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    blockdiag.linear(*tensors)
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) == pytest.approx(0.7 if LT else 0.01, abs=0.005)
