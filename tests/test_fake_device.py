"""The CUDA host code without a GPU: on the fake devices of testing/fake_cuda, in separate processes.

Not named after CUDA, so that `-k cuda` on a machine with a GPU excludes it. Needs a build with CUDA, g++ and nvcc's
headers, which FAIL_WITHOUT_CUDA_BUILD=1 requires.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import require_cuda_build

ROOT = Path(__file__).parents[1]
FAKE = str(ROOT / "testing" / "fake_cuda")

# The GPU tests that the fake does not run.
EXCLUDED = [
    # Code that Triton compiles for a GPU.
    "tests/test_compile.py::test_compile_one_graph_for_all_batch_sizes[cuda-inductor]",
    "tests/test_compile.py::test_modes[cuda-reduce-overhead]",
    "tests/test_compile.py::test_modes[cuda-max-autotune]",
    "tests/test_compile.py::test_neighbors_are_fused[cuda]",
    "tests/test_mixed_dtypes_traced.py::test_compile[cuda",  # and all that begin so
    # Minutes, and 4 GiB: check_host.py does that with untouched memory.
    "tests/test_cuda.py::TestDevice::test_more_than_two_to_the_31_elements",
]
EXCLUDING = [argument for test in EXCLUDED for argument in ("--deselect", test)]


@pytest.fixture(autouse=True)
def _require_cuda_build():
    require_cuda_build()


def run_on_fake(*arguments: str, **environment: str) -> str:
    """Runs pytest on the fake devices; returns its last line."""
    command = [sys.executable, FAKE, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "FAIL_WITHOUT_CUDA": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-5000:]
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("library", ["cublas", "cublaslt", "fused"])
def test_calls(library):
    files = [f"testing/fake_cuda/check_{name}.py" for name in ("host", "failures", "epilogues")]
    run_on_fake(*files, BLOCKDIAG_CUDA_GEMM=library)


def test_tuning():
    run_on_fake("testing/fake_cuda/check_tuning.py")


def test_values():
    """All GPU tests."""
    last = run_on_fake("-m", "cuda", *EXCLUDING, "tests", BLOCKDIAG_CUDA_GEMM="cublaslt")
    assert int(last.split()[0]) > 1500, last


@pytest.mark.parametrize("library", ["fused", "small_blocks"])
def test_values_and_bounds(library):
    """Those of the op; cuBLAS computes float64 and complex types. Every tensor has a separate allocation, which exposes
    accesses beyond it."""
    files = ["linear", "random", "autograd", "autocast", "mixed_dtypes", "mixed_dtypes_traced"]
    last = run_on_fake(
        *("-m", "cuda", *EXCLUDING, *(f"tests/test_{name}.py" for name in files)),
        BLOCKDIAG_CUDA_GEMM=library,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    assert int(last.split()[0]) > 1000, last


@pytest.mark.parametrize("library", ["cublas", "fused"])
def test_order(library):
    """Work runs only when something waits for it: a missing dependency computes with old values."""
    run_on_fake("-m", "cuda", "tests/test_cuda.py", *EXCLUDING, BLOCKDIAG_CUDA_GEMM=library, FAKE_CUDA="lazy=1")


def test_what_compute_sanitizer_runs():
    command = [sys.executable, FAKE, sys.executable, str(ROOT / "tests" / "gpu_subset.py")]
    path = ":".join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == [
        "small_blocks: 48 layers checked",
        "cublas: 66 layers checked",
        "cublaslt: 66 layers checked",
        "fused: 66 layers checked",
        "tuned: 8 layers checked",
    ]


# Calls cuBLAS directly, with one mistake each. That the fake reports it proves that the other tests do not make it.
_MISTAKE = """
import ctypes, torch
cublas = ctypes.CDLL(None)
handle, one = ctypes.c_void_p(), ctypes.c_float(1)
a, b, c = (torch.zeros(1 << 20, device="cuda:0") for _ in range(3))
other = torch.zeros(4, device="cuda:1")
cublas.cublasCreate_v2(ctypes.byref(handle))
def gemm(a, b, c, lda=2):
    a, b, c = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, c))
    scale = ctypes.byref(one)
    print("status", cublas.cublasGemmEx(handle, 0, 0, 2, 2, 2, scale, a, 0, lda, b, 0, 2, scale, c, 0, 2, 68, -1))
{call}
"""


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("gemm(a, b, c)", "status 0"),
        ("gemm(a, b, c, lda=1)", "status 7"),
        ("gemm(a, b, c, lda=1 << 30)", "cublasGemmEx: A: the 4294967304 bytes at"),
        ("gemm(a, other, c)", "cublasGemmEx: B: memory of device 1 on device 0"),
        ("gemm(a, b, b)", "cublasGemmEx: D overlaps A or B"),
        (
            "torch.cuda.set_device(1); gemm(a, b, c)",
            "handle, its stream and the current device are not of one",
        ),
        ("cublas.cublasSgemm_v2()", "cublasSgemm_v2 is not faked"),
    ],
    ids=["none", "status", "bounds", "memory", "overlap", "device", "unfaked"],
)
def test_the_fake_notices(call, said):
    command = [sys.executable, FAKE, sys.executable, "-c", _MISTAKE.format(call=call)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert said in result.stdout + result.stderr
