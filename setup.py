"""Builds blockdiag._C, the compiled part of the package. Names and dependencies stand in pyproject.toml.

CUDA is built when torch has CUDA and nvcc is found; a GPU is not needed to build. Environment:

FORCE_CUDA=1          build CUDA, or fail saying what is missing
FORCE_CPU=1           do not build CUDA
TORCH_CUDA_ARCH_LIST  architectures to build for; by default those of this machine's GPUs, and without any "8.0;9.0+PTX"
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "VERSION").read_text().strip()
MINIMUM_TORCH = (2, 11)

if importlib.util.find_spec("torch") is None:
    sys.exit(
        "blockdiag is compiled against the torch that it will run with, and this environment has none.\n"
        "Install torch first, then build without isolation, so that the build sees it:\n"
        "    pip install torch setuptools ninja pybind11\n"
        "    pip install --no-build-isolation ."
    )


def find_toolkit():
    """The folder of the CUDA toolkit that nvcc belongs to, or None.

    nvcc on the PATH may be a wrapper script outside its toolkit, and torch would guess its folder wrong: nvcc is asked.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = os.path.join(home, "bin", "nvcc") if home else shutil.which("nvcc")
    if nvcc is None or not os.access(nvcc, os.X_OK):
        return None
    dryrun = subprocess.run([nvcc, "--dryrun", "unused.cu"], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.*)$", dryrun.stdout + dryrun.stderr, re.MULTILINE)
    return os.path.realpath(top[1]) if top else home


TOOLKIT = find_toolkit()
if TOOLKIT is not None:
    os.environ["CUDA_HOME"] = TOOLKIT  # torch.utils.cpp_extension reads it when it is imported

import torch  # noqa: E402
from torch.utils.cpp_extension import (  # noqa: E402
    BuildExtension,
    CppExtension,
    CUDAExtension,
    include_paths,
)


def decide_cuda():
    """Whether to build CUDA, and why."""
    force_cuda, force_cpu = (os.environ.get(name, "0") == "1" for name in ("FORCE_CUDA", "FORCE_CPU"))
    if force_cuda and force_cpu:
        sys.exit("FORCE_CUDA=1 and FORCE_CPU=1 contradict each other: set one of them.")
    if force_cpu:
        return False, "FORCE_CPU=1"
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} was built without CUDA"
    elif TOOLKIT is None:
        missing = f"torch {torch.__version__} has CUDA {torch.version.cuda}, but no nvcc is on the PATH or in CUDA_HOME"
    else:
        return True, f"torch {torch.__version__} has CUDA {torch.version.cuda}, nvcc is in {TOOLKIT}"
    if force_cuda:
        sys.exit(f"FORCE_CUDA=1, but {missing}.")
    return False, missing


def pip_cuda_headers():
    """The header folders of NVIDIA's libraries as pip installs them (nvidia/cu13/include and the like)."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = nvidia.submodule_search_locations if nvidia else []
    return [str(path) for root in roots for path in sorted(Path(root).glob("cu[0-9]*/include"))]


def torch_release():
    """The "2.11" of torch 2.11.0: the part of its version that fixes the interface of compiled code."""
    release = torch.__version__.split(".")[:2]
    if tuple(map(int, release)) < MINIMUM_TORCH:
        minimum = ".".join(map(str, MINIMUM_TORCH))
        sys.exit(f"blockdiag needs torch {minimum} or newer, but this environment has torch {torch.__version__}.")
    return ".".join(release)


def make_extension():
    with_cuda, why = decide_cuda()
    print(f"blockdiag {VERSION}: building {'CUDA and CPU' if with_cuda else 'CPU only'} ({why})", flush=True)

    def find(pattern):
        return {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern)}

    unavailable = {"csrc/cuda/unavailable.cpp"}
    sources = find("**/*.cpp") - (unavailable if with_cuda else find("cuda/*.cpp") - unavailable)
    macros = [("BLOCKDIAG_VERSION", f'"{VERSION}"')]
    # Warnings are for our code: torch's headers, which torch's own flags name with -I, count as system headers when
    # they are named with -isystem too.
    flags = ["-std=c++20", "-O3"]
    for path in include_paths():
        flags += ["-isystem", path]
    # at::parallel_for runs serially in code that is compiled without OpenMP. Its runtime is the one that torch loads:
    # not linked again.
    compile_args = {"cxx": [*flags, "-g0", "-fopenmp", "-Wall", "-Wextra"]}
    arguments = {"define_macros": macros, "extra_compile_args": compile_args}
    if not with_cuda:
        return CppExtension("blockdiag._C", sorted(sources), **arguments)

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    macros.append(("BLOCKDIAG_CUDA", None))
    compile_args["nvcc"] = [*flags, "-Xcompiler=-Wall,-Wextra"]
    extension = CUDAExtension("blockdiag._C", sorted(sources | find("**/*.cu")), **arguments)
    # Behind the toolkit's own headers: only for libraries such as cuBLAS that the toolkit lacks.
    extension.include_dirs += pip_cuda_headers()
    return extension


setup(
    version=VERSION,
    license="Apache-2.0",
    install_requires=[f"torch=={torch_release()}.*"],
    ext_modules=[make_extension()],
    cmdclass={"build_ext": BuildExtension},
)
