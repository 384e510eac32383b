"""Builds blockdiag._C, the compiled part of the package. Names and dependencies are in pyproject.toml.

CUDA is built when torch has CUDA and nvcc is found; a GPU is not needed to build. Environment:

FORCE_CUDA=1          build CUDA, or fail saying what is missing
FORCE_CPU=1           do not build CUDA
TORCH_CUDA_ARCH_LIST  architectures to build for; by default those of this machine's GPUs, or without any "8.0;9.0+PTX"
MAX_JOBS              files to compile at once; torch reads it

torch is imported late: an sdist is made without it, and `setup.py fingerprint`, which every make calls, must be quick.
"""

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = (ROOT / "VERSION").read_text().strip()
MINIMUM_TORCH = "2.11"
ARGUMENTS = sys.argv[1:]
TORCH = getattr(importlib.util.find_spec("torch"), "origin", None)  # its __init__.py; a leftover folder has none


def without_torch():
    """The error message of a build that sees no torch."""
    places = os.pathsep.join([sys.prefix, *sys.path])
    if "pip-build-env-" in places:
        why = "pip is building in isolation: in an environment of its own, which has no torch"
    elif re.search(r"[/\\](build-env-|builds-v\d)", places):  # of `python -m build` and of uv
        why = "this is an isolated build: in an environment of its own, which has no torch"
    else:
        why = "this environment has none"
    return (
        f"blockdiag is compiled against the torch that it will run with, and {why}.\n"
        "Install torch first, then build without isolation, so that the build sees it:\n"
        '    pip install torch "setuptools>=70.1" ninja pybind11\n'
        "    pip install --no-build-isolation .                  # in blockdiag's source folder; or, from an index,\n"
        "    pip install --no-build-isolation torch-blockdiag"
    )


class NothingToCompile(build_ext):
    """For sdists: torch may be missing, and nothing that depends on it may get into the metadata."""

    def run(self):
        sys.exit(without_torch() if TORCH is None else "Build the sdist and the wheel by two calls of setup.py.")


def says(*command):
    """The version that a program prints."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


# The folder of the CUDA toolkit that nvcc belongs to, or None.
TOOLKIT = says("sh", str(ROOT / "scripts" / "cuda_toolkit.sh")).strip() or None


def fingerprint():
    """A digest of what objects depend on beyond their dependency files.

    Those leave out system headers, torch's and the compiler's among them. pip or uv may replace one release by another
    in place, with file dates of its own.
    """
    torch_version = Path(TORCH).with_name("version.py")  # differs between builds of torch
    variables = (
        r"CC|CXX|C(PP|XX)?FLAGS|LDFLAGS|CPATH|C\w*_INCLUDE_PATH|CUDA_(HOME|PATH)|TORCH_CUDA\w+|\w*NVCC\w*|FORCE_\w+"
    )
    parts = [
        *(torch_version.read_text(), torch_version.stat().st_mtime_ns),
        *(sys.version, sysconfig.get_config_var("SOABI")),
        says(*shlex.split(os.environ.get("CXX", "c++")), "--version"),
        *((TOOLKIT, says(os.path.join(TOOLKIT, "bin", "nvcc"), "--version")) if TOOLKIT else ()),
        sorted(item for item in os.environ.items() if re.fullmatch(variables, item[0])),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def decide_cuda():
    """Whether to build CUDA, and why."""
    import torch

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
        nvcc = re.search(r"release (\d+)\.\d+", says(os.path.join(TOOLKIT, "bin", "nvcc"), "--version"))
        if nvcc and nvcc[1] != torch.version.cuda.split(".")[0]:
            sys.exit(
                f"torch {torch.__version__} has CUDA {torch.version.cuda}, but nvcc in {TOOLKIT} is of CUDA "
                f"{nvcc[0].split()[1]}: the major versions must be the same.\nInstall that toolkit and set CUDA_HOME "
                "to its folder, or install a torch for this one, or build without CUDA: FORCE_CPU=1."
            )
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
    import torch

    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < tuple(map(int, MINIMUM_TORCH.split("."))):
        sys.exit(f"blockdiag needs torch {MINIMUM_TORCH} or newer, but this environment has torch {torch.__version__}.")
    return f"{major}.{minor}"


def local_version(with_cuda):
    """The "+pt2.13cpu" or "+pt2.14cu130" that tells wheels for different torches apart. Each works with its own only.

    pip rejects an sdist that it found by name if the build has another version than the file. So an unpacked sdist gets
    the suffix only in the folders that `python -m build` unpacks to, and pip if it was given the sdist's path.
    """
    import torch

    if (ROOT / "PKG-INFO").exists() and not ROOT.name.startswith((f"torch_blockdiag-{VERSION}", "pip-req-build-")):
        return ""
    return f"+pt{torch_release()}" + (f"cu{torch.version.cuda.replace('.', '')}" if with_cuda else "cpu")


def make_extension(with_cuda, why):
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension, include_paths

    print(f"blockdiag {VERSION}: building {'CUDA and CPU' if with_cuda else 'CPU only'} ({why})", flush=True)

    def find(pattern):
        return {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern)}

    sources = find("**/*.cpp") - (set() if with_cuda else find("**/cuda/**/*.cpp"))
    # No code reads the fingerprint. It is on the command line, and an object whose command line changed is recompiled.
    macros = [("BLOCKDIAG_VERSION", f'"{VERSION}"'), ("BLOCKDIAG_FINGERPRINT", fingerprint())]
    # Warnings are for our code only. torch's flags name its headers with -I; -isystem makes them system headers.
    flags = ["-std=c++20", "-O3"]
    for path in include_paths():
        flags += ["-isystem", path]
    # Without OpenMP at::parallel_for would run serially. Do not link its runtime: torch loads one.
    compile_args = {"cxx": [*flags, "-g0", "-fopenmp", "-Wall", "-Wextra"]}
    arguments = {"define_macros": macros, "extra_compile_args": compile_args, "include_dirs": [str(ROOT / "csrc")]}
    if not with_cuda:
        return CppExtension("blockdiag._C", sorted(sources), **arguments)

    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0+PTX"
    macros.append(("BLOCKDIAG_CUDA", None))
    compile_args["nvcc"] = [*flags, "-Xcompiler=-Wall,-Wextra"]
    extension = CUDAExtension("blockdiag._C", sorted(sources | find("**/*.cu")), **arguments)
    # After the toolkit's own headers: a fallback for libraries, such as cuBLAS, that the toolkit lacks.
    extension.include_dirs += pip_cuda_headers()
    return extension


def built_with_torch():
    """The arguments of setup() that depend on torch."""
    if TOOLKIT is not None:
        os.environ["CUDA_HOME"] = TOOLKIT  # torch.utils.cpp_extension reads it when it is imported
    from torch.utils.cpp_extension import BuildExtension

    with_cuda, why = decide_cuda()
    return {
        "version": VERSION + local_version(with_cuda),
        "install_requires": [f"torch=={torch_release()}.*"],
        "ext_modules": [make_extension(with_cuda, why)],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"build_ext": {"force": True}},  # without ninja, setuptools compares only the sources' dates
    }


if TORCH is None and not {"egg_info", "sdist"} & set(ARGUMENTS):
    sys.exit(without_torch())
if ARGUMENTS == ["fingerprint"]:
    print(fingerprint())
elif TORCH is None or "sdist" in ARGUMENTS:
    setup(
        version=VERSION,
        license="Apache-2.0",
        install_requires=[f"torch>={MINIMUM_TORCH}"],
        ext_modules=[Extension("blockdiag._C", [])],
        cmdclass={"build_ext": NothingToCompile},
    )
else:
    setup(license="Apache-2.0", **built_with_torch())
