"""The problems that are timed, in suites."""

from itertools import product
from typing import NamedTuple


class Problem(NamedTuple):
    """A layer of `num_blocks` blocks of `in_block` -> `out_block` features, applied to `batch` rows."""

    batch: int
    num_blocks: int
    in_block: int
    out_block: int

    def __str__(self) -> str:
        return f"{self.batch}, {self.num_blocks}, {self.in_block}->{self.out_block}"


class Suite(NamedTuple):
    """Problems, and the contestants that compute them.

    Attributes:
        problems: without repetitions.
        contestants: names; empty for all, including the libraries that can compute ours on CUDA.
        rotate: exchange operands for copies between runs, so that they come from memory and not from the cache.
        host: on a GPU, time the call without waiting for the GPU.
    """

    problems: list[Problem]
    contestants: tuple[str, ...] = ()
    rotate: bool = True
    host: bool = False


# From "A (sometimes) faster alternative to a list of nn.Linear layers", which published timings of one big linear, the
# loop and the masked dense layer. There the loop was by far the slowest here, and the fastest below 8 blocks.
PUBLISHED = Problem(128, 32, 32, 32)

# Per-group networks of a recommender: the largest problem of all.
RECOMMENDER = Problem(2560, 12, 1024, 3072)

SMALL = [
    # Where the other ways to write the layer were first compared.
    Problem(128, 32, 32, 32),
    Problem(2048, 32, 32, 32),
    Problem(128, 4, 64, 64),
    Problem(128, 16, 64, 64),
    Problem(128, 16, 256, 256),
    Problem(2048, 3, 96, 96),
    # Tiny blocks and odd ones, which fill neither a vector register nor a tile, and batches of one row.
    Problem(128, 16, 1, 1),
    Problem(7, 5, 3, 5),
    Problem(128, 100, 3, 3),
    Problem(128, 8, 5, 7),
    Problem(2048, 10, 7, 3),
    Problem(1, 16, 8, 8),
    Problem(128, 10, 10, 10),
    Problem(7, 13, 13, 17),
    Problem(128, 32, 16, 16),
    Problem(2048, 16, 16, 16),
    Problem(1, 32, 17, 13),
    Problem(128, 6, 24, 48),
    Problem(2048, 8, 24, 24),
    Problem(1, 64, 32, 32),
    Problem(7, 9, 33, 32),
    Problem(128, 12, 48, 100),
    Problem(1, 8, 63, 64),
    Problem(128, 7, 63, 33),
    Problem(128, 3, 96, 1),
    Problem(2048, 5, 100, 10),
]

# Small blocks to large ones, one block, long batches, and sizes that fill no register.
PRODUCTS = [
    *(Problem(128, 16, size, size) for size in (16, 32, 64, 128, 256)),
    Problem(128, 1, 512, 512),
    Problem(2048, 32, 32, 32),
    Problem(8192, 4, 64, 64),
    Problem(100, 3, 100, 77),
]

QUICK = {
    "cpu": [
        Problem(128, 1, 256, 256),
        Problem(128, 4, 64, 64),
        Problem(128, 16, 64, 64),
        Problem(128, 16, 256, 256),
        Problem(128, 32, 32, 32),
        Problem(2048, 32, 32, 32),
    ],
    "cuda": [
        Problem(128, 1, 1024, 1024),
        *(Problem(128, 16, size, size) for size in (64, 256, 1024)),
        Problem(128, 4, 512, 512),
        Problem(128, 32, 32, 32),
        Problem(2048, 32, 32, 32),
        RECOMMENDER,
    ],
}


def _partitioned() -> list[Problem]:
    """The published problem, with fewer and with more blocks; then linear layers of these total sizes, in blocks."""
    totals = (256, 1024, 8192)
    published = [PUBLISHED._replace(num_blocks=num_blocks) for num_blocks in (32, 2, 4, 8, 16, 64)]
    sweep = [
        Problem(batch, num_blocks, total_in // num_blocks, total_out // num_blocks)
        for batch, num_blocks, total_in, total_out in product((128, 2048, 8, 1), (32, 8), totals, totals)
    ]
    return list(dict.fromkeys(published + sweep))


def make_suites(device: str) -> dict[str, Suite]:
    """The suites by name, for device "cpu" or "cuda"."""
    sizes = [64, 128, 256, 512, 1024, *([2048, 4096] if device == "cuda" else [])]
    # 64 -> 64 features: how time scales with the number of blocks and with the batch.
    scaling = [Problem(128, 2**exponent, 64, 64) for exponent in range(9)]
    scaling += [Problem(2**exponent, 16, 64, 64) for exponent in range(5, 16) if exponent != 7]
    # For benchmarks/decision.py, which decides which library computes on a GPU.
    libraries = ("ours_cublas", "ours_lt", "ours_fused", "ours_tuned", "ours_small")
    deciding = (*libraries, "loop", "dense", "bmm_out")
    of_decision = [Problem(128, num_blocks, size, size) for num_blocks in (16, 1, 4) for size in sizes[:5]]
    of_decision[1:1] = [Problem(128, num_blocks, 32, 32) for num_blocks in (32, 8, 2)] + [Problem(2048, 32, 32, 32)]
    long_sums = [
        Problem(2048, 32, 32, 32),
        Problem(2048, 16, 64, 64),
        Problem(8192, 4, 64, 64),
        Problem(8192, 8, 16, 16),
    ]
    # Call overhead: all of the time at size 1. On a GPU that is not waited for, at larger sizes too.
    calls = [Problem(1, 1, 1, 1), *([Problem(128, 1, 64, 64), Problem(128, 16, 64, 64)] if device == "cuda" else [])]
    # libxsmm computes on a CPU. benchmarks/products.py times each product of these.
    of_cpu = {"libxsmm": Suite(PRODUCTS, contestants=("ours", "loop", "dense", "bmm_out", "libxsmm"))}
    return {
        "quick": Suite(QUICK[device]),
        # The most informative first, for runs that end early.
        "ensemble": Suite([Problem(128, num_blocks, size, size) for num_blocks in (16, 1, 4, 8, 2) for size in sizes]),
        "partitioned": Suite(_partitioned()),
        "recommender": Suite([RECOMMENDER]),
        "small": Suite(SMALL),
        # dense is F.linear.
        "overhead": Suite(calls, contestants=("ours", "loop", "dense"), rotate=False, host=True),
        "decision": Suite(of_decision, contestants=deciding),
        "decision_large": Suite([RECOMMENDER], contestants=deciding),
        "decision_split": Suite(long_sums, contestants=("ours_lt", "ours_small", "ours_unsplit")),
        "scaling": Suite(scaling, contestants=("ours", "loop", "einsum", "baddbmm", "bmm_out")),
        **(of_cpu if device == "cpu" else {}),
    }
