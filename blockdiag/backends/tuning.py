"""Tuning: measures which of cuBLASLt's algorithms is the fastest for a product on a GPU."""

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from blockdiag._load import extension
from blockdiag.backends import cuda

_FORMAT = {"format": "blockdiag tuning", "version": 3}

#: A device, the versions that its measurements hold for, and the choices made there: numbers of a problem by name, and
#: an algorithm's bytes in hexadecimal digits.
Environment = dict[str, Any]


@contextlib.contextmanager
def tune(path: str | os.PathLike[str] | None = None, *, measure: bool = True) -> Iterator[None]:
    """A context in which cuBLASLt uses the fastest of its heuristic's algorithms rather than the first.

    For each new problem, such as a new batch size, up to 16 algorithms are timed on random operands with the problem's
    layout: on up to 64 copies, so that they come from memory rather than from the cache, or on one if it is large. The
    winner is used from then on, also in the backward pass, in other threads, in later calls of this function, and on
    all GPUs of the same name. The bias gradient is fused with the weight's if that is faster (torch.compile handles it
    on its own). An algorithm is excluded if its result differs from that of the heuristic's first, or, in deterministic
    mode, between two runs. During the capture of a CUDA graph nothing is measured: call the model once before.

    It affects the problems that :func:`blockdiag.backends.cuda.preferred_blas_library` lets cuBLASLt compute. A build
    without CUDA has nothing to tune, and warns. The environment variable ``BLOCKDIAG_TUNE=path`` does the same from
    import to exit; a process that skips Python's exit, as those forked by multiprocessing, writes nothing.

    Args:
        path: a JSON file of choices. Those made on this GPU with these versions of torch and cuBLASLt are used, and
            this process's measurements are added at the end. A file that is damaged, or only for other versions or
            GPUs, is ignored with a warning; a file of another kind is never overwritten.
        measure: False uses known choices only, and prevents measurements in this process meanwhile.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.

    Example::

        >>> import torch, blockdiag
        >>> model, batch = blockdiag.BlockDiagLinear(256, 128, num_blocks=4), torch.randn(32, 256)
        >>> with blockdiag.backends.tune("tuning.json"):
        ...     output = model(batch)
    """
    with _tuning(path, measure):
        yield


@contextlib.contextmanager
def _tuning(path: str | os.PathLike[str] | None, measure: bool, compare_devices: bool = True) -> Iterator[None]:
    file = None if path is None else Path(path).resolve()
    if file is not None and not file.parent.is_dir():
        raise FileNotFoundError(f"blockdiag.backends.tune: expected a file in an existing folder, but got {file}")
    if not cuda.is_built():
        warnings.warn(
            "blockdiag.backends.tune: there is nothing to tune, as blockdiag was built without CUDA, and CPUs need no "
            "tuning",
            stacklevel=5,
        )
        yield
        return
    if cuda.preferred_blas_library() == "cublas":
        warnings.warn(
            "blockdiag.backends.tune: only cuBLASLt has algorithms to choose from, but cuBLAS is what computes: set "
            'BLOCKDIAG_CUDA_GEMM=cublaslt, or call blockdiag.backends.cuda.preferred_blas_library("cublaslt")',
            stacklevel=5,
        )
    if file is not None and file.exists():
        try:
            environments = _read(file)
        except (OSError, ValueError) as error:
            warnings.warn(f"blockdiag.backends.tune: {file} is ignored, and left as it is: {error}", stacklevel=5)
            file = None
        else:
            _use(environments, file, compare_devices)
    extension.count_tuning(1, int(not measure))
    try:
        yield
    finally:
        extension.count_tuning(-1, -int(not measure))
        if file is not None:
            try:
                _add_to(file)
            except (OSError, ValueError) as error:  # no reason to lose the program's results
                warnings.warn(f"blockdiag.backends.tune: {file} is left as it is: {error}", stacklevel=5)


def _versions() -> dict[str, Any]:
    return {"torch": str(torch.__version__), "cublaslt": extension.cublaslt_version()}


def _use(environments: list[Environment], file: Path, compare_devices: bool) -> None:
    """Loads the choices made with these versions."""
    versions = _versions()
    matching = [environment for environment in environments if environment.items() >= versions.items()]
    if compare_devices and torch.cuda.is_available():
        names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
        matching = [environment for environment in matching if environment["device"] in names]
        versions["device"] = " or ".join(sorted(names))
    if environments and not matching:
        found = [{name: environment[name] for name in versions} for environment in environments]
        warnings.warn(
            f"blockdiag.backends.tune: {file} has nothing for {versions}: it was made for {found}",
            stacklevel=6,
        )
    for environment in matching:
        for choice in environment["choices"]:
            numbers = [choice["problem"].get(name, 0) for name in extension.PROBLEM_FIELDS]
            algorithm = bytes.fromhex(choice["algorithm"])
            words = [int.from_bytes(algorithm[i : i + 8], "little") for i in range(0, len(algorithm), 8)]
            extension.add_choice(environment["device"], numbers, words)


def _measured() -> list[Environment]:
    """All choices of this process."""
    by_device: dict[str, list[dict[str, Any]]] = {}
    for device, numbers, words in extension.choices():
        problem = dict(zip(extension.PROBLEM_FIELDS, numbers, strict=True))
        del problem["device"]  # an ordinal, which may change
        algorithm = b"".join(word.to_bytes(8, "little") for word in words)
        by_device.setdefault(device, []).append({"problem": problem, "algorithm": algorithm.hex()})
    return [{"device": device, **_versions(), "choices": choices} for device, choices in by_device.items()]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock against other processes; a no-op on file systems without locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _add_to(file: Path) -> None:
    """Adds this process's choices to those of the file, which other processes may have changed meanwhile.

    Raises:
        OSError: it cannot be read or written.
        ValueError: it is not a tuning file any more.
    """
    with _locked(file.parent):
        environments = _read(file) if file.exists() else []
        updated = _with_measured(environments)
        if updated is None:
            return
        # Atomic: a reader sees the old file or the new one, never a part.
        part = file.with_name(f"{file.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps({**_FORMAT, "environments": updated}, indent=1))
            if file.exists():
                shutil.copymode(file, part)
            part.replace(file)
        finally:
            part.unlink(missing_ok=True)


def _with_measured(environments: list[Environment]) -> list[Environment] | None:
    """`environments` with this process's choices, or None if they have all of them."""
    is_new = False
    for environment in _measured():
        name = {key: value for key, value in environment.items() if key != "choices"}
        others = [old for old in environments if not old.items() >= name.items()]
        mine = [old for old in environments if old.items() >= name.items()]
        old_choices = {json.dumps(old["problem"], sort_keys=True): old for same in mine for old in same["choices"]}
        choices = {json.dumps(new["problem"], sort_keys=True): new for new in environment["choices"]}
        is_new = is_new or any(old_choices.get(problem) != new for problem, new in choices.items())
        environments = [*others, {**name, "choices": list((old_choices | choices).values())}]
    return environments if is_new else None


def _read(file: Path) -> list[Environment]:
    """The validated content of a file.

    Raises:
        ValueError: it is not a tuning file, or damaged.
    """
    try:
        content = json.loads(file.read_text())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text: {error}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(content, dict) or not content.items() >= _FORMAT.items():
        raise ValueError(f"expected it to say {_FORMAT}")
    problem_type: dict[str, type] = {name: int for name in extension.PROBLEM_FIELDS if name != "device"}
    environments = content.get("environments")
    if not isinstance(environments, list):
        raise ValueError(f"expected a list of environments, but got {environments!r}")
    for environment in environments:
        _expect(environment, {"device": str, "torch": str, "cublaslt": int, "choices": list})
        for choice in environment["choices"]:
            _expect(choice, {"problem": dict, "algorithm": str})
            _expect(choice["problem"], problem_type)
            if any(not -(2**63) <= number < 2**63 for number in choice["problem"].values()):
                raise ValueError(f"expected numbers of 64 bits, but got {choice['problem']}")
            if len(choice["algorithm"]) != 128 or set(choice["algorithm"]) - set("0123456789abcdef"):
                raise ValueError(f"expected 128 hexadecimal digits, but got {choice['algorithm']!r}")
    return environments


def _expect(value: object, types: dict[str, type]) -> None:
    found = {name: type(item) for name, item in value.items()} if isinstance(value, dict) else type(value)
    if found != types:
        names = {name: kind.__name__ for name, kind in types.items()}
        raise ValueError(f"expected an object of {names}, but got {value!r:.200}")


def tune_from_environment() -> None:
    """Tunes as the environment variable BLOCKDIAG_TUNE requests, until the process ends."""
    path = os.environ.get("BLOCKDIAG_TUNE")
    # The compiled module outlives a second import of the package, so it remembers whether this was done.
    if path and path not in vars(extension).setdefault("tuning_from_environment", []):
        extension.tuning_from_environment.append(path)
        # Does not query device names, which would initialize CUDA on the first device in every process.
        tuning = _tuning(path, measure=True, compare_devices=False)
        try:
            tuning.__enter__()
        except OSError as error:
            warnings.warn(f"BLOCKDIAG_TUNE={path} does nothing: {error}", stacklevel=2)
        else:
            atexit.register(tuning.__exit__, None, None, None)
