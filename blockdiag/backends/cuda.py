"""Which library computes the ops on GPUs."""

from blockdiag._load import extension

__all__ = ["is_built", "preferred_blas_library"]


def is_built() -> bool:
    """Whether blockdiag was built with CUDA, which says nothing of a GPU.

    Example::

        >>> import blockdiag
        >>> blockdiag.backends.cuda.is_built() == (blockdiag.build_info()["cuda"] != "none")
        True
    """
    return hasattr(extension, "preferred_cuda_library")


def preferred_blas_library(name: str | None = None) -> str:
    """Sets, if a name is given, which library is asked first on GPUs in this process, and returns it.

    The twin of :func:`torch.backends.cuda.preferred_blas_library`. At first it is what the environment variable
    BLOCKDIAG_CUDA_GEMM says, or ``"cublas"``; :func:`blockdiag.build_info` reports it as ``"cuda_gemm"``.

    Args:
        name: ``"cublas"``; ``"cublaslt"``, which adds the bias in the product's kernel and leaves to cuBLAS what it
            has no algorithm for; or ``"small_blocks"``, kernels of our own for blocks of up to 64 -> 64 features in
            float16 and bfloat16, which leave all else to cuBLASLt.

    Raises:
        ValueError: there is no such library.
        RuntimeError: blockdiag was built without CUDA.

    Example::

        >>> import blockdiag
        >>> if blockdiag.backends.cuda.is_built():
        ...     before = blockdiag.backends.cuda.preferred_blas_library()
        ...     assert blockdiag.backends.cuda.preferred_blas_library("cublaslt") == "cublaslt"
        ...     before = blockdiag.backends.cuda.preferred_blas_library(before)
    """
    if not is_built():
        raise RuntimeError(
            "blockdiag.backends.cuda.preferred_blas_library: expected a build of blockdiag with CUDA, but this has none"
        )
    return extension.preferred_cuda_library(name)
