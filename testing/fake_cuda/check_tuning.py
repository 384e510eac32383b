"""Tuning on a fake device, where a test sets the times of cuBLASLt's algorithms. Run by tests/test_fake_device.py.

The fake's heuristic recommends algorithms 21, 31 and 66, in this order, of 10 microseconds each.
"""

import itertools
import json
import re
import subprocess
import sys
import threading

import pytest
import torch

import blockdiag
from blockdiag._load import extension
from fake_cuda.aten import fake
from fake_cuda.check_host import INTERNAL_ERROR, NOT_SUPPORTED, calls, gradients, operands, problem
from fake_cuda.check_host import _reset as _reset
from reference import Problem, check, make


@pytest.fixture(autouse=True)
def _cublaslt_and_torchs_own_flags(_reset):
    before = blockdiag.backends.cuda.preferred_blas_library()
    blockdiag.backends.cuda.preferred_blas_library("cublaslt")
    torch.use_deterministic_algorithms(False)
    yield
    blockdiag.backends.cuda.preferred_blas_library(before)
    for name in ("wrong_31", "unsteady_31", "skips_31", "fails_31"):
        fake.set(name, 0)


_sizes = itertools.count()


def algorithms(function) -> list[str]:
    """Algorithm and epilogue (0: none, 1: bias, 3: gradient of the bias) of each product, and other calls by name."""
    fake.clear()
    function()
    products = [re.search(r"epilogue=(\d) algo=(\d+)", entry) for entry in fake.log()]
    names = [
        found[2] + " +-b"[int(found[1])] if found else name for found, name in zip(products, fake.log(), strict=True)
    ]
    return [name.strip() for name in names if not name.startswith(("cudaMalloc", "cudaStreamSynchronize"))]


def step(tensors):
    output = blockdiag.linear(*tensors)
    return (output, *gradients(output, tensors, torch.ones_like(output)))


def test_the_fastest_computes():
    tensors = operands(problem())
    grad_output = torch.randn(6, 12, device="cuda")
    output = step(tensors)[0]
    before = algorithms(lambda: gradients(output, tensors, grad_output))
    assert before == ["21", "21", "aten::sum.dim_IntList"]
    fake.set("cost_31", 5)
    with blockdiag.backends.tune():
        check(blockdiag.linear, *tensors, grad_output=grad_output)
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["31+"]
        assert algorithms(lambda: gradients(output, tensors, grad_output)) == ["31", "31b"]
        assert algorithms(lambda: gradients(output, tensors[1:2], grad_output)) != ["31b"], "no bias, no sum"
    assert algorithms(lambda: blockdiag.linear(*tensors)) == ["21+"]
    assert algorithms(lambda: gradients(output, tensors, grad_output)) == before
    with blockdiag.backends.tune(measure=False):
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["31+"]


def test_what_is_not_clearly_faster_changes_nothing():
    tensors = operands(problem())
    output = blockdiag.linear(*tensors)
    ones = torch.ones_like(output)
    fake.set("cost_21", 1000)
    fake.set("cost_31", 990)
    fake.set("cost_66", 1100)
    with blockdiag.backends.tune():
        step(tensors)
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["21+"]
        backward = algorithms(lambda: gradients(output, tensors, ones))
        assert backward == ["21", "21", "aten::sum.dim_IntList"], "a sum by itself takes 1 microsecond here"


def test_nothing_unknown_is_measured_if_that_is_not_wanted():
    tensors = operands(problem())
    blockdiag.linear(*tensors)
    fake.set("cost_31", 5)
    with blockdiag.backends.tune(measure=False):
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["21+"]
    with blockdiag.backends.tune():
        assert len(algorithms(lambda: blockdiag.linear(*tensors))) > 100
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["31+"]


def test_wrong_results_do_not_win():
    """Algorithm 31 is the fastest, but leaves out an eighth of the sum."""
    fake.set("cost_31", 1)
    fake.set("wrong_31", 7)
    tensors = operands(Problem((6,), 3, 8, 4))
    with blockdiag.backends.tune():
        check(blockdiag.linear, *tensors)
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["21+"]


@pytest.mark.parametrize("input", [0.0, torch.inf], ids=str)
def test_wrong_results_do_not_win_where_the_operands_hide_them(input):
    fake.set("cost_31", 1)
    fake.set("wrong_31", 7)
    tensors = operands(Problem((6,), 3, 8, 4 + (input > 0)))
    with torch.no_grad():
        tensors[0].fill_(input)
    with blockdiag.backends.tune():
        blockdiag.linear(*tensors)
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["21+"]


@pytest.mark.parametrize("failure", ["skips_31", "fails_31"])
def test_what_computes_nothing_does_not_win(failure):
    """With an error, or silently."""
    fake.set("cost_31", 1)
    fake.set(failure, 1)
    tensors = operands(problem())
    with blockdiag.backends.tune():
        check(blockdiag.linear, *tensors, grad_output=torch.randn(6, 12, device="cuda"))
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["21+"]
        output = blockdiag.linear(*tensors)
        backward = algorithms(lambda: gradients(output, tensors, output.detach()))
        assert backward == ["21", "21b"]


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_bias_gradient_of_any_size_and_layout(num_blocks, dtype):
    fake.set("cost_31", 1)
    batch, in_block, out_block = 6, 9 + next(_sizes), 33
    for stacked, bias in itertools.product([False, True], ["flat", "stacked"]):
        tensors = make(Problem((batch,), num_blocks, in_block, out_block), dtype, "cuda", stacked=stacked, bias=bias)
        rows = (num_blocks, out_block) if stacked else (num_blocks * out_block,)
        contiguous = torch.randn(batch, *rows, dtype=dtype, device="cuda")
        expanded = contiguous[:1].expand(batch, *rows)
        transposed = contiguous.flatten(1).mT.contiguous().mT.view(contiguous.shape) if not stacked else contiguous
        with blockdiag.backends.tune():
            for grad_output in (contiguous, expanded, transposed):
                check(torch.ops.blockdiag.linear, *tensors, grad_output=grad_output)
            output = torch.ops.blockdiag.linear(*tensors)
            assert algorithms(lambda o=output, t=tensors, g=contiguous: gradients(o, t, g)) == ["31", "31b"]


def test_batched_gradients():
    """By torch.autograd.grad with is_grads_batched: no fused op supports its tensors."""
    fake.set("cost_31", 1)
    tensors = operands(problem())
    output = blockdiag.linear(*tensors)
    many = torch.randn(3, 6, 12, device="cuda")
    with blockdiag.backends.tune():
        step(tensors)
        batched = torch.autograd.grad(output, tensors, many, retain_graph=True, is_grads_batched=True)
        single = [gradients(output, tensors, grad_output) for grad_output in many]
    for index, grads in enumerate(batched):
        torch.testing.assert_close(grads, torch.stack([each[index] for each in single]), rtol=1e-4, atol=1e-4)


def test_deterministic_mode_wants_the_same_bits_twice():
    """Algorithm 31 is the fastest, but leaves out one term of 6001 every other time."""
    fake.set("cost_31", 1)
    fake.set("wrong_31", 3)
    fake.set("unsteady_31", 1)
    tensors = operands(Problem((6,), 3, 6001, 4))
    for deterministic, expected in [(False, "31+"), (True, "21+"), (False, "31+")]:
        torch.use_deterministic_algorithms(deterministic)
        with blockdiag.backends.tune():
            blockdiag.linear(*tensors)
            assert algorithms(lambda: blockdiag.linear(*tensors))[-1] == expected


def test_deterministic_mode_sums_the_bias_gradient_by_itself():
    tensors = operands(problem())
    fake.set("cost_31", 1)
    torch.use_deterministic_algorithms(True)
    output = blockdiag.linear(*tensors)
    with blockdiag.backends.tune():
        step(tensors)
        backward = calls(lambda: gradients(output, tensors, torch.ones_like(output)))
        assert backward[-1] == "aten::sum.dim_IntList"


_READER = """
import sys, torch, blockdiag
from fake_cuda.aten import fake
blockdiag.backends.cuda.preferred_blas_library("cublaslt")
x, w, b = (torch.randn(s, device="cuda", requires_grad=True) for s in ((6, 3 * 1234), (3, 4, 1234), (12,)))
with blockdiag.backends.tune(sys.argv[1], measure=False):
    fake.clear()
    y = blockdiag.linear(x, w, b)
    torch.autograd.grad(y, (x, w, b), torch.ones(6, 12, device="cuda"))
print(*[entry.split("algo=")[1] for entry in fake.log() if "algo=" in entry])
"""


def test_another_process_uses_what_was_measured(tmp_path):
    path = tmp_path / "tuning.json"
    tensors = operands(Problem((6,), 3, 1234, 4))
    fake.set("cost_31", 5)
    with blockdiag.backends.tune(path):
        step(tensors)

    def read() -> list[str]:
        command = [sys.executable, "-c", _READER, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert read() == ["31"] * 3
    content = json.loads(path.read_text())
    mine = [choice for choice in content["environments"][0]["choices"] if choice["problem"]["k"] == 1234]
    assert content["environments"][0]["device"] == "Fake H100"
    assert len(mine) == 1
    # Bytes of no algorithm do no harm.
    for environment in content["environments"]:
        for choice in environment["choices"]:
            choice["algorithm"] = "ab" * 64
    path.write_text(json.dumps(content))
    assert read() == ["21"] * 3


def test_a_file_of_another_device_is_reported(tmp_path):
    path = tmp_path / "tuning.json"
    with blockdiag.backends.tune(path):
        step(operands(problem()))
    path.write_text(path.read_text().replace("Fake H100", "Fake B200"))
    with (
        pytest.warns(UserWarning, match="has nothing for .*Fake H100.*Fake B200") as caught,
        blockdiag.backends.tune(path),
    ):
        pass
    assert caught[0].filename == __file__


def test_nothing_is_measured_in_a_capture():
    """Earlier measurements are used."""
    known, unknown = operands(problem()), operands(problem())
    known, unknown = ([tensor.detach() for tensor in tensors] for tensors in (known, unknown))
    fake.set("cost_31", 5)
    with blockdiag.backends.tune():
        blockdiag.linear(*known)
        graph = torch.cuda.CUDAGraph()

        def capture():
            with torch.cuda.graph(graph):
                return [blockdiag.linear(*known), blockdiag.linear(*unknown)]

        fake.clear()
        outputs = capture()
        assert re.findall(r"algo=(\d+)", "\n".join(fake.log())) == ["31", "21"]
        graph.replay()
        for output, tensors in zip(outputs, (known, unknown), strict=True):
            torch.testing.assert_close(output, blockdiag.linear(*tensors))
        assert algorithms(lambda: blockdiag.linear(*unknown)) == ["31+"], "the capture left it to be measured"


@pytest.mark.parametrize("count", [1, 2])
def test_where_memory_runs_out_the_heuristics_choice_stands(count):
    tensors = [tensor.detach() for tensor in operands(Problem((60000 + count,), 3, 16, 16))]
    blockdiag.linear(*tensors)
    torch.cuda.empty_cache()
    fake.set("cost_31", 5)
    fake.set("malloc_after", 1 + count)
    with blockdiag.backends.tune():
        try:
            blockdiag.linear(*tensors)
        except torch.OutOfMemoryError:
            assert count == 1, "of the output itself"
            return
        finally:
            fake.set("malloc_after", 0)
        assert algorithms(lambda: blockdiag.linear(*tensors)) in (["21+"], ["31+"])
        assert len(algorithms(lambda: blockdiag.linear(*tensors))) == 1, "it is not tried again and again"


def test_measuring_spares_captures_of_other_threads():
    tensors, others = ([tensor.detach() for tensor in operands(problem())] for _ in range(2))
    blockdiag.linear(*tensors)
    fake.set("cost_31", 5)
    ready, captures = threading.Event(), threading.Event()

    def measure_meanwhile():
        blockdiag.linear(
            *tensors
        )  # torch 2.11 makes a thread's cuBLAS handle at its first product, which a capture forbids
        ready.set()
        captures.wait()
        blockdiag.linear(*others)

    graph = torch.cuda.CUDAGraph()
    with blockdiag.backends.tune():
        thread = threading.Thread(target=measure_meanwhile)
        thread.start()
        ready.wait()
        with torch.cuda.graph(graph):
            output = blockdiag.linear(*tensors)
            captures.set()
            thread.join()
    graph.replay()
    torch.testing.assert_close(output, blockdiag.linear(*tensors))
    with blockdiag.backends.tune(measure=False):
        assert algorithms(lambda: blockdiag.linear(*others)) == ["31+"]


def test_a_heuristic_that_fails_in_a_capture_is_asked_again():
    tensors = [tensor.detach() for tensor in operands(problem())]
    graph = torch.cuda.CUDAGraph()
    fake.set("heuristic_status", INTERNAL_ERROR)
    with torch.cuda.graph(graph):
        output = blockdiag.linear(*tensors)
    graph.replay()
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_INTERNAL_ERROR"):
        blockdiag.linear(*tensors)
    fake.set("heuristic_status", 0)
    torch.testing.assert_close(output, blockdiag.linear(*tensors))
    assert algorithms(lambda: blockdiag.linear(*tensors)) == ["21+"]


def test_one_of_several_threads_measures():
    tensors = [tensor.detach() for tensor in operands(problem())]
    blockdiag.linear(*tensors)
    fake.set("cost_31", 5)
    with blockdiag.backends.tune():
        alone = [tensor.detach() for tensor in operands(problem())]
        once = len(algorithms(lambda: blockdiag.linear(*alone)))
        fake.clear()
        threads = [threading.Thread(target=lambda: blockdiag.linear(*tensors)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        products = len(re.findall("algo=", "\n".join(fake.log())))
        assert products < once + 8
        assert algorithms(lambda: blockdiag.linear(*tensors)) == ["31+"]


def test_what_cublaslt_refuses_is_not_asked_again():
    tensors = [tensor.detach() for tensor in operands(problem())]
    fake.set("matmul_status", NOT_SUPPORTED)
    assert "cublasLtMatmul" in calls(lambda: blockdiag.linear(*tensors))
    assert calls(lambda: blockdiag.linear(*tensors)) == ["aten::copy_", "cublasGemmStridedBatchedEx"]
    fake.set("matmul_status", 0)
    with blockdiag.backends.tune():
        assert calls(lambda: blockdiag.linear(*tensors)) == ["aten::copy_", "cublasGemmStridedBatchedEx"]


def test_choices_hold_for_all_devices_of_a_name():
    here = problem()
    fake.set("cost_31", 5)
    with blockdiag.backends.tune():
        blockdiag.linear(*operands(here))
        known = len(extension.choices())
        there = operands(here, device="cuda:1")
        assert algorithms(lambda: blockdiag.linear(*there))[-1] == "31+"
        assert len(extension.choices()) == known
