"""``python -m blockdiag``: the environment report that a bug report needs."""

import os
import platform
import re
import sys
from pathlib import Path

import torch

import blockdiag


def _cpu_name() -> str:
    """The processor as Linux names it, or as Python does elsewhere."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def report() -> dict[str, str]:
    """What blockdiag was built with and what it finds here, by name."""
    built = blockdiag.build_info()
    config = torch.__config__.show()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    lines = {
        "blockdiag": built["version"],
        "built with": f"torch {built['torch']}, CUDA {built['cuda']}, compiler {built['compiler']}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "python": sys.version.replace("\n", " "),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "CPU": f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "BLAS of torch": ", ".join(re.findall(r"BLAS_INFO=\w+|Math Kernel Library Version [\d.]+", config)),
        "CPU GEMM": built["cpu_gemm"],
        "GPUs": ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus) or "none",
    }
    if "cublas" in built:
        lines["cuBLAS"] = f"{built['cublas']}; GEMM by {built['cuda_gemm']}"
    variables = (
        "ATEN_CPU_CAPABILITY",
        "BLOCKDIAG_CPU_GEMM",
        "BLOCKDIAG_CUDA_GEMM",
        "BLOCKDIAG_TUNE",
        "CUBLAS_WORKSPACE_CONFIG",
        "CUDA_VISIBLE_DEVICES",
        "MKL_ENABLE_INSTRUCTIONS",
        "NVIDIA_TF32_OVERRIDE",
        "ONEDNN_MAX_CPU_ISA",
    )
    for name in variables:
        if name in os.environ:
            lines[name] = os.environ[name]
    return lines


if __name__ == "__main__":
    for name, value in report().items():
        print(f"{name + ':':26}{value}")
