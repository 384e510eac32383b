"""The products of the layer by kernels that libxsmm generates: one call into C++ for all blocks, on one thread.

Debian's libxsmm-dev has the library; its LIBXSMM_TARGET limits the instruction set, as ATEN_CPU_CAPABILITY does ours.
"""

import ctypes
import time
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import native
from benchmarks.suites import Problem

PRODUCTS = ("forward", "grad input", "grad weight")
TUNING_SECONDS = 0.01  # for each choice of tiles


class Tiles(NamedTuple):
    """The sizes that a kernel is generated for: c of m x n is a sum of products over k. They divide the problem's."""

    m: int
    n: int
    k: int


class _Description(ctypes.Structure):
    """struct Product of libxsmm.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("blocks", "m", "n", "k", "tile_m", "tile_n", "tile_k")),
        *((name, ctypes.c_int64) for name in ("lda", "a_block", "a_m", "a_k")),
        *((name, ctypes.c_int64) for name in ("ldb", "b_block", "b_n", "b_k")),
        *((name, ctypes.c_int64) for name in ("ldc", "c_block", "transposed_b")),
        *((name, ctypes.c_void_p) for name in ("store", "add")),
    ]


def _library() -> ctypes.CDLL:
    try:
        library = native.load("libxsmm", "xsmm", "xsmmnoblas")
    except NotImplementedError as error:
        raise NotImplementedError(f"needs libxsmm 1.17 (Debian: libxsmm-dev): {error}") from error
    library.prepare.restype = ctypes.c_bool
    library.compute.argtypes = [ctypes.c_void_p] * 5
    library.compute.restype = None
    return library


class Product:
    """One of PRODUCTS for a problem. Column-major: what is a row here is a column of libxsmm's a, b and c.

    forward: y = W x, grad input: grad x = W^T grad y, grad weight: grad W^T = x grad y^T. The batch's matrices are read
    and written where they lie; the weight has been arranged beforehand.

    Raises:
        NotImplementedError: libxsmm is not installed, or has no kernel.
    """

    def __init__(self, problem: Problem, name: str, tiles: Tiles):
        library = _library()
        batch, num_blocks, in_block, out_block = problem
        self.name, self.tiles = name, tiles
        # The distances between rows, and between blocks.
        x, y = (num_blocks * in_block, in_block), (num_blocks * out_block, out_block)
        area = in_block * out_block
        sizes = _sizes(problem, name)
        if name == "grad weight":
            self._shape = (num_blocks, out_block, in_block)
            strides = [*x, tiles.m, tiles.k * x[0], *y, tiles.n, tiles.k * y[0], in_block, area]
        else:
            right, result = (x, y) if name == "forward" else (y, x)
            self._shape = (batch, result[0])
            left = [tiles.m, area, tiles.m * sizes[2], tiles.m * tiles.k]
            strides = [*left, *right, tiles.n * right[0], tiles.k, *result]
        transposed = name == "grad weight"
        self._description = _Description(num_blocks, *sizes, *tiles, *strides, transposed, None, None)
        self._address = ctypes.addressof(self._description)
        if not library.prepare(ctypes.byref(self._description)):
            raise NotImplementedError(f"libxsmm has no kernel for {name} of {problem}")
        self._compute = library.compute

    def arrange(self, weight: Tensor) -> Tensor:
        """The weight (G, N, K) as this product's left operand: tile by tile, in the order of their use."""
        num_blocks, out_block, in_block = weight.shape
        m, _, k = self.tiles
        if self.name == "forward":
            return weight.view(num_blocks, out_block // m, m, in_block // k, k).permute(0, 1, 3, 4, 2).contiguous()
        return weight.view(num_blocks, out_block // k, k, in_block // m, m).permute(0, 3, 1, 2, 4).contiguous()

    def __call__(self, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of an arranged weight and x or grad y, or of x and grad y."""
        result = right.new_empty(self._shape)
        pointers = left.data_ptr(), right.data_ptr(), result.data_ptr(), None if bias is None else bias.data_ptr()
        self._compute(self._address, *pointers)
        return result


def _sizes(problem: Problem, name: str) -> tuple[int, int, int]:
    """m, n and k of a product."""
    batch, _, in_block, out_block = problem
    sizes = {
        "forward": (out_block, batch, in_block),
        "grad input": (in_block, batch, out_block),
        "grad weight": (in_block, out_block, batch),
    }
    return sizes[name]


def fitting(size: int, choices: tuple[int, ...]) -> list[int]:
    """The choices of a tile's size that divide `size`, and `size` itself."""
    return [size, *(choice for choice in choices if choice < size and size % choice == 0)]


def tuned_product(problem: Problem, name: str) -> Product:
    """The product with the tiles that are fastest on random operands."""
    batch, num_blocks, in_block, out_block = problem
    x, grad_output = torch.randn(batch, num_blocks * in_block), torch.randn(batch, num_blocks * out_block)
    weight = torch.randn(num_blocks, out_block, in_block)
    m, n, k = _sizes(problem, name)
    best: tuple[float, Product] | None = None
    for tiles in product(fitting(m, (32, 64)), fitting(n, (64, 128)), fitting(k, (64, 128))):
        candidate = Product(problem, name, Tiles(*tiles))
        left = x if name == "grad weight" else candidate.arrange(weight)
        right = x if name == "forward" else grad_output
        seconds = _shortest(candidate, left, right)
        if best is None or seconds < best[0]:
            best = seconds, candidate
    assert best is not None
    return best[1]


def _shortest(candidate: Product, left: Tensor, right: Tensor) -> float:
    began = last = time.perf_counter()
    shortest = float("inf")
    while last - began < TUNING_SECONDS or shortest == float("inf"):
        candidate(left, right)
        now = time.perf_counter()
        shortest, last = min(shortest, now - last), now
    return shortest
