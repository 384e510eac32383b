"""``python -m blockdiag``: an environment report for bug reports."""

import importlib
import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path


def _cpu_name() -> str:
    """The processor's name, from Linux or else from Python."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version_of(distribution: str) -> str:
    """The installed version. Metadata that a build left in the source folder does not count."""
    found = importlib.metadata.distributions(name=distribution)
    versions = (each.version for each in found if not Path(str(each.locate_file("setup.py"))).exists())
    return next(versions, "none")


def _installation() -> dict[str, str]:
    lines = {"installed": f"torch-blockdiag {_version_of('torch-blockdiag')}, imported from {Path(__file__).parent}"}
    diagrams = _version_of("blockdiag")
    if diagrams != "none":
        lines["in its place"] = f"blockdiag {diagrams}, which draws diagrams and is imported by the same name"
    return lines


def _machine() -> dict[str, str]:
    return {
        "python": sys.version.replace("\n", " "),
        "platform": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    }


def _report_without_import() -> dict[str, str]:
    """The part of the report that needs neither torch nor the compiled module."""
    modules = []
    for path in sorted(Path(__file__).parent.glob("_C*")):
        built = re.search(rb"blockdiag was built for torch ([0-9.]+)", path.read_bytes())
        modules.append(f"{path.name} for torch {built[1].decode() if built else '?'}")
    return {
        **_installation(),
        "compiled modules": ", ".join(modules) or "none",
        "torch": _version_of("torch"),
        **_machine(),
        "CPU": _cpu_name(),
    }


def report() -> dict[str, str]:
    """What blockdiag was built with and what it finds at run time, by name.

    Raises:
        ImportError: the package cannot be imported.
    """
    # Not at the top: main() reports a failing import.
    built = importlib.import_module("blockdiag._load").extension.build_info()
    import torch

    config = torch.__config__.show()
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    lines = {
        "blockdiag": built["version"],
        **_installation(),
        "built with": f"torch {built['torch']}, CUDA {built['cuda']}, compiler {built['compiler']}",
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        **_machine(),
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


def main(problem: ImportError | None = None) -> int:
    """Prints the report, or as much as possible if the package cannot be imported. Returns the exit status."""
    if problem is None:
        try:
            lines = report()
        except ImportError as error:
            problem = error
    if problem is not None:
        lines = _report_without_import()
    for name, value in lines.items():
        print(f"{name + ':':26}{value}")
    if problem is None:
        return 0
    print(f"\nblockdiag cannot be imported: {problem}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
