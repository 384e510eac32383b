"""The products of the layer one by one: libxsmm computes them, and the program that compares them with ours."""

from itertools import product

import pytest
import torch
from test_benchmark_ceilings import one_thread as one_thread
from test_benchmarks import CPU, PROBLEM
from test_benchmarks import _short_rounds as _short_rounds
from test_benchmarks import _small_ceiling as _small_ceiling

import reference
from benchmarks import libxsmm, native, products
from benchmarks.contestants import CONTESTANTS
from benchmarks.libxsmm import PRODUCTS, Product, Tiles, fitting, tuned_product
from benchmarks.suites import Problem, make_suites
from benchmarks.timing import PRECISIONS, measure

ODD = Problem(7, 3, 10, 13)
TILED = Problem(8, 3, 12, 20)


@pytest.fixture
def installed(one_thread, monkeypatch):
    """Skips the test where libxsmm is not installed."""
    monkeypatch.setattr(libxsmm, "TUNING_SECONDS", 1e-4)
    try:
        Product(PROBLEM, "forward", Tiles(5, 6, 4))
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.fixture
def missing(one_thread, monkeypatch):
    def load(name, *libraries):
        if name == "libxsmm":
            raise NotImplementedError("c++ cannot compile libxsmm.cpp: no header")
        return compiled(name, *libraries)

    compiled = native.load
    monkeypatch.setattr(native, "load", load)


def operands(problem):
    batch, num_blocks, in_block, out_block = problem
    x = torch.randn(batch, num_blocks * in_block, requires_grad=True)
    weight = torch.randn(num_blocks, out_block, in_block, requires_grad=True)
    grad_output = torch.randn(batch, num_blocks * out_block)
    return x, weight, grad_output


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("problem", [PROBLEM, ODD, TILED, Problem(1, 1, 1, 1)], ids=str)
def test_products(problem, name, installed):
    """With tiles of all sizes, each in a place of its own."""
    x, weight, grad_output = operands(problem)
    y = reference.linear(x, weight)
    expected = dict(zip(PRODUCTS, [y, *torch.autograd.grad(y, [x, weight], grad_output)], strict=True))
    x, weight = x.detach(), weight.detach()
    sizes = {"forward": (20, 8, 12), "grad input": (12, 8, 20), "grad weight": (12, 20, 8)}
    choices = [fitting(size, (4, 2)) for size in sizes[name]] if problem == TILED else []
    for tiles in [*product(*choices)] if choices else [tuned_product(problem, name).tiles]:
        computed = Product(problem, name, Tiles(*tiles))
        left = x if name == "grad weight" else computed.arrange(weight)
        actual = computed(left, x if name == "forward" else grad_output)
        torch.testing.assert_close(actual, expected[name], msg=lambda text, tiles=tiles: f"tiles {tiles}: {text}")


def test_contestant(installed):
    """For inference, with a bias, and for batches of which its tiles are no divisors."""
    with torch.no_grad():
        for batch in (1, 3, 128, 192):
            x, weight, _ = operands(Problem(batch, 3, 64, 128))
            bias = torch.randn(3 * 128)
            forward, parameters = CONTESTANTS["libxsmm"](weight, bias)
            torch.testing.assert_close(forward(x, *parameters), reference.linear(x, weight, bias))


def test_contestant_where_it_is_not_installed(missing):
    entry = measure(["libxsmm"], PROBLEM, PRECISIONS["float32"], CPU)["libxsmm"]
    expected = "needs libxsmm 1.17 (Debian: libxsmm-dev): c++ cannot compile libxsmm.cpp: no header"
    assert entry == {"skipped": expected}


@pytest.mark.parametrize(
    ("precision", "backward", "threads", "reason"),
    [
        ("bfloat16", False, 1, "float32 on one thread of a CPU only"),
        ("float32", False, 2, "float32 on one thread of a CPU only"),
        ("float32", True, 1, "inference only"),
        ("amp-bfloat16", False, 1, "not under autocast"),
    ],
)
def test_contestant_where_it_does_not_apply(precision, backward, threads, reason, installed):
    torch.set_num_threads(threads)
    entry = measure(["libxsmm"], PROBLEM, PRECISIONS[precision], CPU, backward=backward)["libxsmm"]
    assert entry == {"skipped": reason}


@pytest.fixture
def small(monkeypatch):
    suite = make_suites("cpu")["libxsmm"]._replace(problems=[PROBLEM])
    monkeypatch.setattr(products, "PEAK_REPEATS", 1 << 10)
    monkeypatch.setattr(products, "make_suites", lambda device: {"libxsmm": suite})


def test_program(small, installed, capsys):
    assert products.main(["--rounds", "2", "--rotate"]) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("GFLOP/s in float32, threads: 1, instruction set of ours: ")
    assert head.split()[3:7] == ["product", "ours", "libxsmm", "peak"]
    assert [line.startswith(f"{PROBLEM}  ") for line in lines] == [True] * 3


def test_program_where_libxsmm_is_not_installed(small, missing, capsys):
    assert products.main(["--rounds", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("needs libxsmm 1.17 (Debian: libxsmm-dev)") == 3
    for line in captured.out.splitlines()[2:]:
        ours, libxsmm, _, ratio, _, libxsmm_of_peak = line.split()[-6:]
        assert float(ours) >= 0  # of a tiny problem, rounded
        assert (libxsmm, ratio, libxsmm_of_peak) == ("-", "-", "-")


def test_row():
    """The ratios are within a round; a slow contestant skips the last ones."""
    rates = {"ours": [10.0, 20.0, 30.0], "libxsmm": [20.0, 10.0], "peak": [40.0, 40.0, 60.0]}
    expected = ["20.0", "15.0", "40.0", "1.25", "0.50", "0.38"]
    assert products.row(PROBLEM, "forward", rates) == [str(PROBLEM), "forward", *expected]
    assert products.row(PROBLEM, "forward", {"ours": [10.0]})[2:] == ["10.0", *["-"] * 5]


def test_program_checks_results(small, monkeypatch, one_thread):
    monkeypatch.setattr(products, "_ours", lambda problem, name: lambda left, right: torch.zeros(()))
    with pytest.raises(AssertionError, match="ours is wrong on 6, 3, 4->5: forward has relative error 1"):
        products.main(["--rounds", "2"])
