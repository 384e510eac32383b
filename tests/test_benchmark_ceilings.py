"""The benchmark's ceilings: the CPU's peak and bandwidth, and the floor that they are for a problem."""

import os
import shutil

import pytest
import torch
from test_benchmarks import CPU
from test_benchmarks import _small_ceiling as _small_ceiling

import blockdiag
from benchmarks import ceilings, native
from benchmarks.ceilings import Ceiling, floor_us, instruction_set_of, measure_ceiling, peak_rate
from benchmarks.suites import Problem
from benchmarks.timing import Precision, run


def test_floor():
    # 2 rows, 3 blocks 5 -> 7: x of 30 elements, W of 105, b of 21, y of 42; 2 * 2 * 3 * 5 * 7 = 420 operations.
    problem, precision = Problem(2, 3, 5, 7), Precision(torch.float32)
    compute_bound, memory_bound = Ceiling(1e6, 1e12), Ceiling(1e12, 1e6)
    assert floor_us(problem, precision, False, compute_bound) == pytest.approx(420)
    assert floor_us(problem, precision, True, compute_bound) == pytest.approx(3 * 420)
    forward, grad_input, grad_weight = 30 + 105 + 21 + 42, 42 + 105 + 30, 42 + 30 + 105 + 21
    assert floor_us(problem, precision, False, memory_bound) == pytest.approx(4 * forward)
    assert floor_us(problem, precision, True, memory_bound) == pytest.approx(4 * (forward + grad_input + grad_weight))
    # y and its gradient have 2 bytes, all else has 4.
    autocast = Precision(torch.float32, torch.bfloat16)
    saved = 2 * 42
    assert floor_us(problem, autocast, False, memory_bound) == pytest.approx(4 * forward - saved)
    assert floor_us(problem, autocast, True, memory_bound) == pytest.approx(
        4 * (forward + grad_input + grad_weight) - 3 * saved
    )
    assert floor_us(problem, autocast, True, compute_bound) == pytest.approx(3 * 420)


@pytest.mark.parametrize(
    ("names", "preferred", "float32", "bfloat16", "float16"),
    [
        ("aten, mkl, avx2", "avx2", "avx2", "avx2", "avx2"),
        ("aten, mkl, avx2", "mkl", None, None, None),
        ("aten", "aten", None, None, None),
        ("aten, mkl, avx2, avx512", "avx512", "avx512", "avx512", "avx512"),
        ("aten, mkl, avx2, avx512, avx512_bf16", "avx512_bf16", "avx512", "avx512_bf16", "avx512"),
        ("aten, mkl, avx2, avx512, avx512_bf16", "avx2", "avx2", "avx2", "avx2"),
        # torch's GEMM has other instructions for half types then.
        ("aten, mkl, avx2, avx512, avx512_bf16, native_half", "native_half", "avx512", None, None),
        ("aten, mkl, avx2, avx512, avx512_bf16, native_half", "avx512_bf16", "avx512", "avx512_bf16", "avx512"),
    ],
)
def test_instruction_set(names, preferred, float32, bfloat16, float16):
    expected = {torch.float32: float32, torch.bfloat16: bfloat16, torch.float16: float16, torch.float64: None}
    build_info = {"cpu_gemm": preferred, "cpu_gemms": names}
    assert {dtype: instruction_set_of(dtype, build_info) for dtype in expected} == expected


@pytest.fixture
def instruction_set():
    """That of our kernels on this CPU, if there are any, and a compiler; otherwise the test is skipped."""
    name = instruction_set_of(torch.float32, blockdiag.build_info())
    if name is None:
        pytest.skip("this CPU has no kernels of ours")
    if shutil.which(native.get_cxx_compiler()) is None:
        pytest.skip("no compiler")
    return name


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_peak_is_more_than_a_gemm_reaches(instruction_set, one_thread, monkeypatch):
    if os.environ.get("ATEN_CPU_CAPABILITY") or os.environ.get("BLOCKDIAG_CPU_GEMM"):
        pytest.skip("MKL may use a wider instruction set")
    monkeypatch.setattr(ceilings, "PEAK_REPEATS", 1 << 20)
    matrix, ratios = torch.randn(512, 512), []
    for _ in range(5):  # others may use the machine
        rate = 2 * 512**3 / (1e-6 * min(run(lambda: matrix @ matrix, 1, CPU) for _ in range(5)))
        ratios.append(peak_rate(instruction_set, 1) / rate)
        if ratios[-1] > 1 / 1.05:
            return
    pytest.fail(f"the peak is {max(ratios):.2f} of what a GEMM reaches")


def test_ceiling_of_a_cpu(instruction_set):
    ceiling = measure_ceiling(torch.float32, CPU)
    assert ceiling.operations_per_second > 0
    assert ceiling.instruction_set == instruction_set
    assert ceiling.bytes_per_second == max(ceiling.read_bytes_per_second, ceiling.copy_bytes_per_second) > 0


def test_ceiling_without_a_compiler(instruction_set, monkeypatch):
    """The rate of a GEMM, and the result says so."""
    monkeypatch.setattr(native, "get_cxx_compiler", lambda: "missing-compiler")
    native.load.cache_clear()
    with pytest.warns(UserWarning, match=r"the rate of a large GEMM.*no compiler for peak\.cpp.*missing-compiler"):
        ceiling = measure_ceiling(torch.float32, CPU)
    assert ceiling.operations_per_second > 0
    assert ceiling.instruction_set is None


def test_ceiling_of_other_dtypes():
    """A float64 has no kernels of ours."""
    assert measure_ceiling(torch.float64, CPU).instruction_set is None


def test_ceiling_of_a_gpu(cuda):
    ceiling = measure_ceiling(torch.float16, torch.device(cuda))
    assert ceiling == Ceiling(ceiling.operations_per_second, ceiling.copy_bytes_per_second, None, None, ceiling[4])


def test_unknown_instruction_set(instruction_set):
    with pytest.raises(NotImplementedError, match="no multiply-adds of avx3"):
        peak_rate("avx3", 1)


def test_source_that_does_not_compile(monkeypatch):
    monkeypatch.setattr(native, "get_cxx_compiler", lambda: "false")
    native.load.cache_clear()
    with pytest.raises(NotImplementedError, match=r"false cannot compile peak\.cpp"):
        native.load("peak")
