"""Devices: every test that takes `device` runs on the CPU, and on CUDA if there is a GPU and a CUDA build.

FAIL_WITHOUT_CUDA=1 says that a GPU is expected: then a test that would be skipped for want of one fails.
FAIL_WITHOUT_CUDA_BUILD=1 says the same of a build with CUDA. FAILURES=FILE has each failure appended to it at once,
for runs that may be killed.
"""

import os

import pytest
import torch

import blockdiag


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:  # the workers' controller has all reports
        library = os.environ.get("BLOCKDIAG_CUDA_GEMM", "cublas")
        traceback = "".join(f"    {line}\n" for line in report.longreprtext.splitlines())
        with open(path, "a") as file:
            file.write(f"FAILED {library} {report.nodeid}\n{traceback}")


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if blockdiag.build_info()["cuda"] == "none":
        return "blockdiag was built without CUDA"
    return None


def require_cuda() -> None:
    """Skips the test if it cannot run on a GPU, or fails it if a GPU is expected."""
    reason = _why_no_cuda()
    if reason is not None:
        if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
            pytest.fail(f"FAIL_WITHOUT_CUDA=1, but {reason}")
        pytest.skip(reason)


def require_cuda_build() -> None:
    """Skips the test if blockdiag was built without CUDA, or fails it if such a build is expected."""
    if blockdiag.build_info()["cuda"] == "none":
        if os.environ.get("FAIL_WITHOUT_CUDA_BUILD") == "1":
            pytest.fail("FAIL_WITHOUT_CUDA_BUILD=1, but blockdiag was built without CUDA")
        pytest.skip("blockdiag was built without CUDA")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    if request.param == "cuda":
        require_cuda()
    return request.param


@pytest.fixture
def cuda() -> str:
    require_cuda()
    return "cuda"


@pytest.fixture(autouse=True)
def _seeded_and_strict():
    """Same random numbers in every run, NaN in memory that an op leaves unwritten, full precision on a GPU."""
    torch.manual_seed(0)
    matmul = torch.backends.cuda.matmul
    flags = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    # For convolutions that results are compared with: unlike for products, TF32 is on by default.
    cudnn_tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    # In deterministic mode torch.empty fills what it allocates with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = flags
