"""Selection of the library that computes the ops on CPUs."""

from blockdiag._load import extension

__all__ = ["preferred_blas_library"]


def preferred_blas_library(name: str | None = None) -> str:
    """Sets the preferred library on CPUs for this process, if a name is given, and returns the current one.

    Meant for comparisons. The default is the fastest that this CPU supports, or the one that the environment variable
    BLOCKDIAG_CPU_GEMM names. :func:`blockdiag.build_info` reports it as ``"cpu_gemm"``, and all names as
    ``"cpu_gemms"``.

    Args:
        name: an instruction set of this CPU, for our own kernels (``"avx2"``, ``"avx512"`` or ``"avx512_bf16"``), which
            compute float32 and half types; ``"native_half"``, torch's GEMM for large blocks of half types, if it has
            native instructions that our kernels do not use; ``"mkl"``, if torch has it; or ``"aten"``. Each falls back
            to the next in this list.

    Raises:
        ValueError: this CPU has no such library.

    Example::

        >>> import blockdiag
        >>> before = blockdiag.backends.cpu.preferred_blas_library()
        >>> blockdiag.backends.cpu.preferred_blas_library("aten")
        'aten'
        >>> blockdiag.backends.cpu.preferred_blas_library(before) == before
        True
    """
    return extension.preferred_cpu_library(name)
