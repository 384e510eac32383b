"""Compiles the fake: `library()` is the shared object to load in front of the real ones.

Besides the faked functions it has a stub for every other CUDA function that torch or blockdiag imports. A stub fails by
name, so that no call reaches a real library, which would only report that there is no device.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EMULATION = ROOT / "tests" / "cpp"
KERNELS = [*(ROOT / "csrc" / "cuda" / "kernels").iterdir(), *EMULATION.glob("emulated_*.h")]
IMPORTERS = [
    "torch_cuda",
    "c10_cuda",
    "torch_python",
    "torch_cpu",
    "torch_nvshmem",
    "torch_cuda_linalg",
    "caffe2_nvrtc",
]

# Functions of the real libraries that need no device.
REAL = re.compile(
    r"cuda(GetErrorName|GetErrorString)|cublas(GetStatusName|GetStatusString|GetProperty)"
    r"|cublasLt(GetVersion|GetProperty|Matmul(Desc|Preference)\w+|MatrixLayout\w+)"
)

# Excludes CUDA's headers, which declare these functions with their arguments.
_STUB_HEADER = """#include <string>
namespace fake {
[[noreturn]] void fail(const std::string& what);
}
#define FAKE_STUB(name) \\
  extern "C" __attribute__((visibility("default"))) void name() { fake::fail(#name " is not faked"); }
"""


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"no package {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def _include_folders() -> list[Path]:
    """The include folders of nvcc's toolkit, and of NVIDIA's packages."""
    toolkit = subprocess.run(["sh", ROOT / "scripts" / "cuda_toolkit.sh"], capture_output=True, text=True, check=False)
    folders = [Path(toolkit.stdout.strip()) / "include"] if toolkit.returncode == 0 else []
    if importlib.util.find_spec("nvidia"):
        folders += sorted(_folder("nvidia").glob("cu[0-9]*/include"))
    return [folder for folder in folders if folder.is_dir()]


def _imported() -> set[str]:
    libraries = [_folder("torch") / "lib" / f"lib{name}.so" for name in IMPORTERS]
    libraries += (ROOT / "blockdiag").glob("_C*.so")
    command = ["nm", "-D", "--undefined-only", *(str(path) for path in libraries if path.exists())]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r" U ((?:__cuda|cuda|cublas|cu[A-Z])\w+)", symbols))


def _compile(source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    flags = [
        "-std=c++20",
        "-O2",
        "-march=native",
        "-fopenmp-simd",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
    ]
    includes = [f"-isystem{path}" for path in [*_include_folders(), _folder("torch") / "include"]]
    includes += [f"-I{path}" for path in (HERE, EMULATION, ROOT / "csrc")]
    subprocess.run(["g++", *flags, *includes, "-c", str(source), "-o", str(target)], check=True)
    return target


def _build(target: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda source: _compile(source, folder), sorted(HERE.glob("*.cpp"))))
        defined = subprocess.run(["nm", *map(str, objects)], capture_output=True, text=True, check=True).stdout
        missing = _imported() - set(re.findall(r" T (\w+)", defined))
        stubs = folder / "stubs.cpp"
        stubs.write_text(
            _STUB_HEADER
            + "".join(f"FAKE_STUB({symbol})\n" for symbol in sorted(missing) if not REAL.fullmatch(symbol)),
        )
        objects.append(_compile(stubs, folder))
        made = folder / "made.so"
        # The driver's name, so that libraries that need the driver find this one loaded.
        link = ["g++", "-shared", "-Wl,-soname,libcuda.so.1", *map(str, objects), "-ldl", "-o", str(made)]
        subprocess.run(link, check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        shutil.copy(made, partial)
        partial.replace(target)  # atomic: several processes may build


def library() -> Path:
    """The fake, compiled if its sources or its importers changed."""
    digest = hashlib.sha256()
    for source in sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), Path(__file__), *KERNELS]):
        digest.update(source.read_bytes())
    digest.update("\n".join(sorted(_imported())).encode())
    target = ROOT / "build" / f"fake_cuda-{digest.hexdigest()[:16]}" / "libfake_cuda.so"
    if not target.exists():
        _build(target)
    return target


if __name__ == "__main__":
    print(library())
