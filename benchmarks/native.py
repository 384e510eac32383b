"""The benchmark's C++ sources, compiled on first use into torch's folder for extensions."""

import ctypes
import functools
import hashlib
import shlex
import subprocess
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler, get_default_build_root

FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared", "-pthread")


@functools.cache
def load(name: str, *libraries: str) -> ctypes.CDLL:
    """Loads what benchmarks/NAME.cpp becomes, linked with `libraries`.

    Raises:
        NotImplementedError: it does not compile here: another processor, no compiler, or no such library.
    """
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler, arguments = shlex.split(get_cxx_compiler()), [*FLAGS, str(source), *(f"-l{each}" for each in libraries)]
    key = hashlib.sha256(repr((compiler, arguments)).encode() + source.read_bytes()).hexdigest()[:16]
    library = Path(get_default_build_root(), "blockdiag_benchmarks", f"{name}-{key}.so")
    try:
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:  # another process may compile it, too
                built = Path(folder, library.name)
                subprocess.run([*compiler, *arguments, "-o", built], capture_output=True, text=True, check=True)
                built.replace(library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines()
        reason = next((line for line in lines if "error" in line), "".join(lines[-1:])).removeprefix(f"{source}:")
        raise NotImplementedError(f"{compiler[0]} cannot compile {source.name}: {reason}") from error
    except OSError as error:
        raise NotImplementedError(f"no compiler for {source.name}, or nowhere to write its result: {error}") from error
