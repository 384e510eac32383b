"""The functional form of the structured layers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blockdiag import _load  # noqa: F401  # registers the op, or says why it cannot

__all__ = ["linear", "sparse_linear"]


def is_jagged(input: Any) -> bool:
    # A proxy of torch.fx is no Tensor, and does not know whether it is nested.
    return isinstance(input, Tensor) and input.is_nested and input.layout == torch.jagged


def of_jagged(function: Callable[..., Tensor], input: Any, *args: Any) -> Tensor:
    """Applies a function of rows to a nested tensor whose rows lie one after the other, in the order of its batch."""
    if input._ragged_idx != 1:
        raise NotImplementedError(
            f"blockdiag.linear: expected a jagged input to be ragged in dimension 1, but it is in {input._ragged_idx}: "
            "transpose it back"
        )
    if input.lengths() is not None:
        raise NotImplementedError(
            "blockdiag.linear: expected the rows of a jagged input to lie one after the other, but there are holes "
            "between them: call .contiguous() first"
        )
    output = function(input.values(), *args)
    lengths = {"min_seqlen": input._maybe_min_seqlen, "max_seqlen": input._maybe_max_seqlen}  # known already, or None
    return torch.nested.nested_tensor_from_jagged(output, input.offsets(), **lengths)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Applies :math:`G` independent linear layers to :math:`G` slices of the input, as one operation.

    ``output[..., g, :] = input[..., g, :] @ weight[g].T + bias[g]``: what :func:`torch.nn.functional.linear` computes
    with the dense weight ``torch.block_diag(*weight)``, without the zeros.

    Args:
        input: :math:`(*, G \cdot K)`, the slices side by side (concatenated), or :math:`(*, G, K)` (stacked), with any
            number of leading dimensions, none included. Where the sizes fit both, it is taken as concatenated. May be a
            nested tensor of :obj:`torch.jagged` layout, ragged in dimension 1, without holes.
        weight: :math:`(G, N, K)`; block ``g`` is laid out as the weight of ``nn.Linear(K, N)``.
        bias: :math:`(G \cdot N)` or :math:`(G, N)`, optional.

    Returns:
        :math:`(*, G \cdot N)` for concatenated input, :math:`(*, G, N)` for stacked input; always contiguous.

    All tensors share one device and one dtype: float16, bfloat16 (both accumulated in float32), float32, float64,
    complex64 or complex128. Any strides are accepted; what BLAS can address is read where it lies. Differentiable to
    any order, in reverse and forward mode, and under :mod:`torch.func`.

    Under :class:`torch.autocast` the output has autocast's dtype, and the tensors may be float32 or have that dtype,
    in any mixture. Our own CPU kernels (:func:`blockdiag.build_info` names them) cast nothing: float32 tensors are
    converted, if at all, as they are read, sums are in float32, and each gradient is rounded once, to the dtype of its
    tensor. Elsewhere, and on a GPU, the arguments are cast as those of :func:`torch.nn.functional.linear` are, unless
    the libraries that are off by default compute (:func:`blockdiag.backends.cuda.preferred_blas_library`).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or a size exceeds BLAS's 32-bit integers. Raised
            before any work is done.
        NotImplementedError: the tensors are on a device that blockdiag has no kernels for, or was built without; or of
            a layout that it does not take (sparse, quantized, strided nested tensors).

    See :class:`blockdiag.BlockDiagLinear` for the module.

    Example::

        >>> import torch, blockdiag
        >>> x, w, b = torch.randn(128, 4 * 64), torch.randn(4, 32, 64), torch.randn(4 * 32)
        >>> blockdiag.linear(x, w, b).shape
        torch.Size([128, 128])
        >>> blockdiag.linear(x.view(128, 4, 64), w, b).shape  # stacked
        torch.Size([128, 4, 32])
    """
    if not torch.jit.is_scripting() and is_jagged(input):
        return of_jagged(torch.ops.blockdiag.linear, input, weight, bias)
    return torch.ops.blockdiag.linear(input, weight, bias)


def sparse_linear(
    input: Tensor,
    values: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    bias: Tensor | None = None,
    diagonal: Tensor | None = None,
) -> Tensor:
    r"""Applies a linear layer of whose weight only some blocks are kept, without the others.

    ``output = input @ weight.T + bias``, where ``weight`` is the matrix that
    :func:`torch.sparse_bsr_tensor` makes of ``crow_indices``, ``col_indices`` and ``values``.

    Args:
        input: :math:`(*, K)`, with any number of leading dimensions. May be a nested tensor of :obj:`torch.jagged`
            layout, ragged in dimension 1, without holes.
        values: :math:`(B, n, k)`, the kept blocks, row by row of blocks; :math:`n` and :math:`k` are any sizes, and
            :math:`k` divides :math:`K`.
        crow_indices: :math:`(N / n + 1)`, where the blocks of each row begin, from 0 to :math:`B`.
        col_indices: :math:`(B)`, the column of each block, ascending in each row. Both indices are int32, or both
            int64; int32 ones are read where they lie.
        bias: :math:`(N)`, optional.
        diagonal: :math:`(N)`, optional, where :math:`N` is a multiple of :math:`K`: what is added to the diagonal of
            the weight, or of each of the square matrices that it stacks, as those of a recurrent layer's gates.

    Returns:
        :math:`(*, N)`, always contiguous.

    The other tensors share one dtype, as for :func:`blockdiag.linear`, and all share one device. Differentiable to any
    order, in reverse and forward mode, and under :mod:`torch.func`; nothing of the dense weight's size is ever made on
    a CPU. Under :class:`torch.autocast` tensors are cast as those of :func:`torch.nn.functional.linear` are. On a GPU
    the dense weight is made in each call, and a warning says so.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or indices on a CPU are out of order, repeated or
            out of range. Raised before any work is done.
        NotImplementedError: as for :func:`blockdiag.linear`.

    See :class:`blockdiag.BlockSparseLinear` for the module.

    Example::

        >>> import torch, blockdiag
        >>> dense = torch.randn(32, 8) * torch.tensor([1., 0., 0., 1., 1., 0., 0., 0.])
        >>> weight = dense.to_sparse_bsr((16, 1))
        >>> x = torch.randn(5, 8)
        >>> output = blockdiag.sparse_linear(x, weight.values(), weight.crow_indices(), weight.col_indices())
        >>> torch.testing.assert_close(output, x @ dense.T)
    """
    if not torch.jit.is_scripting() and is_jagged(input):
        return of_jagged(torch.ops.blockdiag.sparse_linear, input, values, crow_indices, col_indices, bias, diagonal)
    return torch.ops.blockdiag.sparse_linear(input, values, crow_indices, col_indices, bias, diagonal)
