"""Selection of the library that computes the ops on GPUs."""

from blockdiag._load import extension

__all__ = ["is_built", "preferred_blas_library"]


def is_built() -> bool:
    """Whether blockdiag was built with CUDA, regardless of whether there is a GPU.

    Example::

        >>> import blockdiag
        >>> blockdiag.backends.cuda.is_built() == (blockdiag.build_info()["cuda"] != "none")
        True
    """
    return hasattr(extension, "preferred_cuda_library")


def preferred_blas_library(name: str | None = None) -> str:
    """Sets the preferred library on GPUs for this process, if a name is given, and returns the current one.

    The counterpart of :func:`torch.backends.cuda.preferred_blas_library`. The default is the one that the environment
    variable BLOCKDIAG_CUDA_GEMM names, or ``"cublaslt"``. :func:`blockdiag.build_info` reports it as ``"cuda_gemm"``.

    Args:
        name: ``"cublas"``; ``"cublaslt"``, which fuses the bias into the product and falls back to cuBLAS if it has no
            algorithm; ``"fused"``, which also fuses the bias's gradient and, under autocast, needs no casts of results
            and one launch for those of a product's operands; or ``"small_blocks"``, our own kernels for blocks of up to
            64 -> 64 features in float16 and bfloat16, which cast nothing under autocast and fall back to ``"fused"``.
            The last two have not run on a GPU as they are now.

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
