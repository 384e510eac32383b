"""The ways to write a block-diagonal linear layer, one short function each. To add one, write its function here.

A contestant takes a weight (G, N, K) and a bias (G * N,) and returns its forward function and its parameters, in any
form. `forward(x, *parameters)` computes concatenated output (B, G * N) from concatenated input (B, G * K). It uses the
parameters that it is given, so that they can be exchanged for copies.

Where a contestant does not apply, it or its forward function raises NotImplementedError, or torch a RuntimeError. Under
autocast, additions that torch would compute in float32 are cast, as a careful user would.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

import blockdiag
from benchmarks.libxsmm import Product, fitting, tuned_product
from benchmarks.suites import Problem
from blockdiag import backends
from blockdiag._load import extension

Forward = Callable[..., Tensor]
Contestant = Callable[[Tensor, Tensor], tuple[Forward, list[Tensor]]]

CONTESTANTS: dict[str, Contestant] = {}
COMPILED = ("ours", "loop", "einsum")  # also timed in compiled mode
# Larger dense weights are not built: they would not fit in memory next to all other contestants' tensors.
DENSE_ELEMENTS = 1 << 29
# torch's Triton kernel takes a block of a sparse weight as a tile, and cannot compile larger ones.
BSR_BLOCK = 128


def contestant(function: Contestant) -> Contestant:
    CONTESTANTS[function.__name__] = function
    return function


def _batched(features: Tensor, num_blocks: int) -> Tensor:
    """Concatenated (B, G * K) as a view in the batched layout (G, B, K)."""
    return features.view(len(features), num_blocks, -1).transpose(0, 1)


def _concatenated(batched: Tensor) -> Tensor:
    """Batched (G, B, N) copied into the concatenated layout (B, G * N)."""
    return batched.transpose(0, 1).flatten(1)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """Casts like autocast does for F.linear, for functions that autocast leaves alone."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _dense_weight(weight: Tensor) -> Tensor:
    size = len(weight) * weight.numel()
    if size > DENSE_ELEMENTS:
        raise NotImplementedError(f"a dense weight of {size / 2**30:.1f} Gi elements")
    return torch.block_diag(*weight)


@contestant
def ours(weight: Tensor, bias: Tensor):
    return blockdiag.linear, [weight, bias]


@contestant
def loop(weight: Tensor, bias: Tensor):
    """A linear layer for each block, their outputs concatenated."""
    num_blocks = len(weight)

    def forward(x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[:num_blocks], parameters[num_blocks:]
        slices = x.chunk(num_blocks, dim=-1)
        return torch.cat([F.linear(*block) for block in zip(slices, weights, biases, strict=True)], dim=-1)

    return forward, [*weight, *bias.view(num_blocks, -1)]


@contestant
def dense(weight: Tensor, bias: Tensor):
    """One linear layer with the zeros in place: shows what multiplying zeros costs. In training it is another layer."""
    return F.linear, [_dense_weight(weight), bias]


@contestant
def masked_dense(weight: Tensor, bias: Tensor):
    """One linear layer whose weight is masked in each call."""
    masked = _dense_weight(weight)
    mask = torch.block_diag(*torch.ones_like(weight))
    return lambda x, masked, bias: F.linear(x, masked * mask, bias), [masked, bias]


@contestant
def block_diag(weight: Tensor, bias: Tensor):
    """One linear layer whose weight is assembled in each call."""
    return lambda x, weight, bias: F.linear(x, _dense_weight(weight), bias), [weight, bias]


@contestant
def bsr(weight: Tensor, bias: Tensor):
    """A block-sparse weight, for inference."""
    num_blocks, out_block, in_block = weight.shape
    if weight.is_cuda and max(out_block, in_block) > BSR_BLOCK:
        raise NotImplementedError(f"blocks of more than {BSR_BLOCK} features on CUDA")
    size = (num_blocks * out_block, num_blocks * in_block)
    rows, columns = (torch.arange(end, device=weight.device) for end in (num_blocks + 1, num_blocks))
    sparse = torch.sparse_bsr_tensor(rows, columns, weight, size=size, check_invariants=False)

    def forward(x: Tensor, sparse: Tensor, bias: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("inference only")
        return F.linear(x, sparse, bias)

    return forward, [sparse, bias]


@contestant
def grouped_conv1d(weight: Tensor, bias: Tensor):
    """A convolution of length 1 with one group for each block."""
    num_blocks = len(weight)

    def forward(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        return F.conv1d(x.unsqueeze(-1), kernel, bias, groups=num_blocks).squeeze(-1)

    return forward, [weight.flatten(0, 1).unsqueeze(-1), bias]


@contestant
def einsum(weight: Tensor, bias: Tensor):
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        stacked = x.view(len(x), len(weight), -1)
        product = torch.einsum("bgk,gnk->bgn", stacked, weight).flatten(1)
        return product + bias.to(product.dtype)

    return forward, [weight, bias]


@contestant
def vmap(weight: Tensor, bias: Tensor):
    """F.linear, vectorized over the blocks by torch."""
    mapped = torch.vmap(F.linear, in_dims=(1, 0, 0), out_dims=1)

    def forward(*tensors: Tensor) -> Tensor:
        x, weight, bias = _autocast(*tensors)
        num_blocks = len(weight)
        return mapped(x.view(len(x), num_blocks, -1), weight, bias.view(num_blocks, -1)).flatten(1)

    return forward, [weight, bias]


@contestant
def bmm(weight: Tensor, bias: Tensor):
    """A batched product between two copies, into the batched layout and out of it."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        product = _concatenated(torch.bmm(_batched(x, len(weight)).contiguous(), weight.mT))
        return product + bias.to(product.dtype)

    return forward, [weight, bias]


@contestant
def baddbmm(weight: Tensor, bias: Tensor):
    """Like bmm, but the product adds the bias."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        num_blocks = len(weight)
        batched = _batched(x, num_blocks).contiguous()
        return _concatenated(torch.baddbmm(bias.view(num_blocks, 1, -1), batched, weight.mT))

    return forward, [weight, bias]


class _BmmOut(torch.autograd.Function):
    """Batched products that write into strided views of their results: `out=` itself does not support autograd."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        num_blocks = len(weight)
        output = x.new_empty(len(x), len(bias))
        torch.bmm(_batched(x, num_blocks), weight.mT, out=_batched(output, num_blocks))
        return output.add_(bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        x, weight = ctx.saved_tensors
        num_blocks = len(weight)
        grad_x = torch.empty_like(x)
        batched = _batched(grad_output, num_blocks)
        torch.bmm(batched, weight, out=_batched(grad_x, num_blocks))
        grad_weight = torch.bmm(batched.mT, _batched(x, num_blocks))
        return grad_x, grad_weight, grad_output.sum(0)


@contestant
def bmm_out(weight: Tensor, bias: Tensor):
    """Without copies, like HazyResearch/fly and NVIDIA/recsys-examples#263."""
    return lambda *tensors: _BmmOut.apply(*_autocast(*tensors)), [weight, bias]


@contestant
def grouped_mm(weight: Tensor, bias: Tensor):
    """torch's product for mixtures of experts, of two batches of matrices."""
    if not hasattr(F, "grouped_mm"):
        raise NotImplementedError(f"torch {torch.__version__} has no torch.nn.functional.grouped_mm")

    def forward(*tensors: Tensor) -> Tensor:
        x, weight, bias = _autocast(*tensors)
        return _concatenated(F.grouped_mm(_batched(x, len(weight)), weight.mT)) + bias

    return forward, [weight, bias]


def _packed(weight: Tensor, bias: Tensor, **arguments: str):
    """What PackedLinear computes where each estimator is a block (alpha = gamma = 1), as a function of parameters."""
    try:
        from torch_uncertainty.layers import PackedLinear
        from torch_uncertainty.layers.functional.packed import packed_linear
    except ImportError as error:
        raise NotImplementedError("torch_uncertainty is not installed") from error
    num_blocks, out_block, in_block = weight.shape
    layer = PackedLinear(num_blocks * in_block, num_blocks * out_block, alpha=1, num_estimators=num_blocks, **arguments)

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return packed_linear(x, weight, layer.groups, layer.implementation, bias)

    return forward, [weight, bias]


@contestant
def packed_linear(weight: Tensor, bias: Tensor):
    """TorchUncertainty's PackedLinear with its defaults."""
    return _packed(weight, bias)


@contestant
def packed_einsum(weight: Tensor, bias: Tensor):
    """TorchUncertainty's PackedLinear, told to use einsum: the default in some releases."""
    return _packed(weight, bias, implementation="einsum")


@contestant
def libxsmm(weight: Tensor, bias: Tensor):
    """Kernels that libxsmm generates for these blocks, on a weight arranged for them beforehand; for inference."""
    if weight.is_cuda or weight.dtype != torch.float32 or torch.get_num_threads() > 1:
        raise NotImplementedError("float32 on one thread of a CPU only")
    if torch.is_grad_enabled():
        raise NotImplementedError("inference only")
    num_blocks, out_block, in_block = weight.shape
    tiles_for_128 = tuned_product(Problem(128, num_blocks, in_block, out_block), "forward").tiles

    @cache
    def product_of(batch: int) -> Product:
        tiles = tiles_for_128._replace(n=fitting(batch, (tiles_for_128.n,))[-1])
        return Product(Problem(batch, num_blocks, in_block, out_block), "forward", tiles)

    def forward(x: Tensor, arranged: Tensor, bias: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError("not under autocast")
        return product_of(len(x))(arranged, x, bias)

    return forward, [product_of(128).arrange(weight), bias]


@contextmanager
def _cuda_gemm(library: str, tuned: bool = False, split_rows: int | None = None) -> Iterator[None]:
    """Within it, `library` computes ours on CUDA, tuned for this GPU if `tuned`.

    `split_rows`: from this many rows on, small_blocks splits its sums over the batch.
    """
    before = backends.cuda.preferred_blas_library()
    backends.cuda.preferred_blas_library(library)
    rows_before = None if split_rows is None else extension.small_blocks_split_rows(split_rows)
    try:
        with backends.tune() if tuned else nullcontext():
            yield
    finally:
        backends.cuda.preferred_blas_library(before)
        if rows_before is not None:
            extension.small_blocks_split_rows(rows_before)


# More contestants: ours on CUDA, computed by one library whatever the default is.
CUDA_VARIANTS: dict[str, Callable[[], AbstractContextManager]] = {
    "ours_cublas": lambda: _cuda_gemm("cublas"),
    "ours_lt": lambda: _cuda_gemm("cublaslt"),
    "ours_fused": lambda: _cuda_gemm("fused"),
    "ours_tuned": lambda: _cuda_gemm("fused", tuned=True),
    "ours_small": lambda: _cuda_gemm("small_blocks"),
    "ours_unsplit": lambda: _cuda_gemm("small_blocks", split_rows=1 << 62),
}
OURS = ("ours", *CUDA_VARIANTS)
# The variants that run where a suite names no contestants.
LIBRARIES = ("ours_lt", "ours_fused", "ours_tuned", "ours_small")


def context_of(name: str) -> AbstractContextManager:
    """The context that a contestant runs in. It is entered for a check, a capture or a round, not for each call."""
    return CUDA_VARIANTS.get(name, nullcontext)()


def make_contestant(name: str, weight: Tensor, bias: Tensor) -> tuple[Forward, list[Tensor]]:
    return CONTESTANTS["ours" if name in CUDA_VARIANTS else name](weight, bias)
