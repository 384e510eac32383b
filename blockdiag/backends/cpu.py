"""Which library computes the ops on CPUs."""

from blockdiag._load import extension

__all__ = ["preferred_blas_library"]


def preferred_blas_library(name: str | None = None) -> str:
    """Sets, if a name is given, which library is asked first on CPUs in this process, and returns it.

    Meant for comparisons: at first it is the best that this CPU has, or what the environment variable
    BLOCKDIAG_CPU_GEMM says. :func:`blockdiag.build_info` reports it as ``"cpu_gemm"``, and all names as
    ``"cpu_gemms"``.

    Args:
        name: an instruction set that this CPU has, for kernels of our own (``"avx2"``, ``"avx512"`` or
            ``"avx512_bf16"``), which compute float32 and half types; ``"native_half"``, where torch multiplies half
            types by instructions that our kernels do not use, for large blocks of these; ``"mkl"``, where torch has it;
            or ``"aten"``. What a library does not take goes to the next of this list.

    Raises:
        ValueError: there is no such library on this CPU.

    Example::

        >>> import blockdiag
        >>> before = blockdiag.backends.cpu.preferred_blas_library()
        >>> blockdiag.backends.cpu.preferred_blas_library("aten")
        'aten'
        >>> blockdiag.backends.cpu.preferred_blas_library(before) == before
        True
    """
    return extension.preferred_cpu_library(name)
