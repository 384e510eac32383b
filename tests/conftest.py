"""Devices: every test that takes `device` runs on the CPU, and on CUDA if there is a GPU and a CUDA build.

FAIL_WITHOUT_CUDA=1 means that a GPU is expected: tests fail instead of being skipped because there is no GPU.
FAIL_WITHOUT_CUDA_BUILD=1 means the same for a build with CUDA.

For scripts/gpu_check.sh, whose time is limited: FAILURES=FILE appends each failure to a file at once; RERUN=FILE runs
only the tests that such a file names for this library; DEADLINE=SECONDS, since the epoch, skips tests after that time.
"""

import os
import time

import pytest
import torch

import blockdiag


def _failed_line(nodeid: str) -> str:
    return f"FAILED {os.environ.get('BLOCKDIAG_CUDA_GEMM', 'cublas')} {nodeid}"


def pytest_runtest_logreport(report: pytest.TestReport | pytest.CollectReport) -> None:
    path = os.environ.get("FAILURES")
    if path and report.failed and "PYTEST_XDIST_WORKER" not in os.environ:  # the workers' controller sees all reports
        traceback = "".join(f"    {line}\n" for line in report.longreprtext.splitlines()[-30:])
        with open(path, "a") as file:
            file.write(f"{_failed_line(report.nodeid)}\n{traceback}")


pytest_collectreport = pytest_runtest_logreport


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if path := os.environ.get("RERUN"):
        with open(path) as file:
            failed = set(file.read().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if _failed_line(item.nodeid) not in failed])
        items[:] = [item for item in items if _failed_line(item.nodeid) in failed]


def _leave_a_lost_device() -> None:
    """After some GPU errors every call of the process fails: ends it, so that no other test fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # another worker continues
        pytest.exit("the GPU is lost to this process", returncode=3)


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
    """Fixes random seeds, fills unwritten memory with NaN, and sets full precision on a GPU."""
    if time.time() > float(os.environ.get("DEADLINE", "inf")):
        pytest.skip("out of time")
    torch.manual_seed(0)
    matmul = torch.backends.cuda.matmul
    flags = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    matmul.allow_fp16_reduced_precision_reduction = matmul.allow_bf16_reduced_precision_reduction = False
    # Reference convolutions: unlike for products, TF32 is on by default.
    cudnn_tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    # In deterministic mode torch.empty fills what it allocates with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = cudnn_tf32
    matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction = flags
    if torch.cuda.is_initialized():
        _leave_a_lost_device()
