"""Loads the compiled part of the package, and says in plain words why it cannot be loaded."""

import importlib
import importlib.machinery
import re
from pathlib import Path
from types import ModuleType

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
_PACKAGE = Path(__file__).parent


def load_extension() -> ModuleType:
    """Imports blockdiag._C, which registers ``torch.ops.blockdiag``.

    Raises:
        ImportError: torch or the compiled module is missing, or they do not match. The message says what to do.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ImportError(
            "blockdiag needs torch, and this environment has none. Install it, then build blockdiag against it, in "
            f"blockdiag's source folder:\n    pip install torch\n    {REBUILD}"
        ) from error

    module = next(
        (path for suffix in importlib.machinery.EXTENSION_SUFFIXES for path in _PACKAGE.glob(f"_C{suffix}")), None
    )
    if module is None:
        raise ImportError(
            f"blockdiag's compiled module is missing from {_PACKAGE}: it was not built, or built for another Python. "
            f"In blockdiag's source folder, build it:\n    {REBUILD}"
        )
    # Before it is loaded: a module built for another torch may crash rather than fail to load.
    built_for = re.search(rb"blockdiag was built for torch ([0-9.]+)", module.read_bytes())
    if built_for and _release(built_for[1].decode()) != _release(torch.__version__):
        raise ImportError(
            f"blockdiag was built for torch {built_for[1].decode()}, but this environment has torch "
            f"{torch.__version__}. Compiled extensions work only with the torch release that they were built for: "
            f"install that one, or build blockdiag again, in its source folder:\n    {REBUILD}"
        )
    try:
        return importlib.import_module("blockdiag._C")
    except ImportError as error:
        raise ImportError(
            f"blockdiag's compiled module cannot be loaded beside torch {torch.__version__}: {error}. If torch was "
            "replaced since blockdiag was built (a CUDA build by a CPU build, say), build blockdiag again, in its "
            f"source folder:\n    {REBUILD}"
        ) from error


def _release(version: str) -> tuple[str, ...]:
    """("2", "13") of "2.13.0+cpu": the part of a torch version that fixes the interface of compiled code."""
    return tuple(version.split(".")[:2])


extension = load_extension()
