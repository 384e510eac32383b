"""Loads the compiled part of the package, and explains a failure to load it."""

import importlib
import importlib.machinery
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

_PACKAGE = Path(__file__).parent
_SOURCES = _PACKAGE.parent  # unless the package is installed


def _rebuild() -> str:
    """How to rebuild this package."""
    if _is_source_folder():  # the module is beside the sources, which hide an installed package
        return f"In blockdiag's source folder, {_SOURCES}:\n    pip install --no-build-isolation --no-deps --editable ."
    # pip may cache the wheel that it built for another torch.
    options = "--no-build-isolation --no-cache-dir --force-reinstall --no-deps"
    return (
        f"In blockdiag's source folder:\n    pip install {options} .\n"
        f"or, if it came from an index:\n    pip install {options} torch-blockdiag"
    )


def _is_source_folder() -> bool:
    return (_SOURCES / "setup.py").exists() and (_SOURCES / "csrc").is_dir()


def compiled_module(package: Path = _PACKAGE) -> Path | None:
    """The path of a package's compiled module for this Python."""
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    return next((path for suffix in suffixes for path in package.glob(f"_C{suffix}")), None)


def built_for(module: Path) -> str | None:
    """The torch that a compiled module was built for, without loading it."""
    found = re.search(rb"blockdiag was built for torch ([0-9.]+)", module.read_bytes())
    return found[1].decode() if found else None


def _installed_package() -> Path | None:
    """A complete package after the source folder on sys.path, if this is the source folder."""
    packages = [Path(entry, "blockdiag").resolve() for entry in sys.path] if _is_source_folder() else []
    return next((path for path in packages if path != _PACKAGE.resolve() and compiled_module(path)), None)


def load_extension() -> ModuleType:
    """Imports blockdiag._C, which registers ``torch.ops.blockdiag``.

    Raises:
        ImportError: torch or the compiled module is missing, or they do not match. The message explains the fix.
    """
    init = _PACKAGE / "__init__.py"
    if not init.exists() or "blockdiag._load" not in init.read_text(errors="replace"):
        raise ImportError(
            f"{init} is missing, or not of torch-blockdiag. The package index's blockdiag draws diagrams and is "
            "imported by the same name: installing or uninstalling it damages torch-blockdiag. Uninstall it, and "
            f"install torch-blockdiag again:\n    pip uninstall blockdiag\n{_rebuild()}"
        )
    try:
        import torch
    except (ImportError, OSError) as error:
        if not isinstance(error, ModuleNotFoundError) or error.name != "torch":
            raise ImportError(f"blockdiag needs torch, and this environment's cannot be imported: {error}") from error
        raise ImportError(
            "blockdiag needs torch, and this environment has none. Install it, then build blockdiag against it:\n"
            f"    pip install torch\n{_rebuild()}"
        ) from error

    module = compiled_module()
    if module is None and (installed := _installed_package()):
        raise ImportError(
            f"blockdiag's compiled module is missing from {_PACKAGE}, blockdiag's source folder, which Python finds "
            f"before the installed package in {installed}. Run Python in another folder, or build in the source folder "
            "too:\n    pip install --no-build-isolation --no-deps --editable ."
        )
    if module is None:
        raise ImportError(
            f"blockdiag's compiled module is missing from {_PACKAGE}: it was not built, or built for another Python. "
            f"Build it. {_rebuild()}"
        )
    # Checked before loading: a module built for another torch may crash rather than fail to load.
    built = built_for(module)
    if built and _release(built) != _release(torch.__version__):
        raise ImportError(
            f"blockdiag was built for torch {built}, but this environment has torch "
            f"{torch.__version__}. Compiled extensions work only with the torch release that they were built for: "
            f"install that one, or build blockdiag again. {_rebuild()}"
        )
    try:
        return importlib.import_module("blockdiag._C")
    except ImportError as error:
        raise ImportError(
            f"blockdiag's compiled module cannot be loaded beside torch {torch.__version__}: {error}. If torch was "
            "replaced since blockdiag was built (a CUDA build by a CPU build, say), build blockdiag again. "
            f"{_rebuild()}"
        ) from error


def _release(version: str) -> tuple[str, ...]:
    """("2", "13") for "2.13.0+cpu": the part of a torch version that determines its ABI."""
    return tuple(version.split(".")[:2])


def _report_is_asked_for() -> bool:
    """Whether ``python -m blockdiag`` runs: Python first imports the package, with "-m" as the program's name."""
    asked = sys.argv[:1] == ["-m"] and re.fullmatch(r"(-\w*m)?blockdiag(\.__main__)?", sys.orig_argv[-len(sys.argv)])
    return bool(asked)


def _report(problem: ImportError) -> int:
    """The report if the package cannot be imported: for the installed one, if the source folder hides it."""
    installed = None if compiled_module() else _installed_package()
    if installed is None:
        from blockdiag.__main__ import main

        return main(problem)
    places = [str(installed.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.call([sys.executable, "-m", "blockdiag"], cwd=installed.parent, env=environment)


try:
    extension = load_extension()
except ImportError as problem:
    if not _report_is_asked_for():
        raise
    sys.exit(_report(problem))
