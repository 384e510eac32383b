"""The benchmark: its contestants compute the same layer, and its numbers are correct."""

import re
from contextlib import contextmanager

import pytest
import torch

import blockdiag
import reference
from benchmarks import __main__ as command
from benchmarks import timing
from benchmarks.contestants import CONTESTANTS, LIBRARIES, OURS
from benchmarks.suites import PUBLISHED, Problem, make_suites
from benchmarks.timing import PRECISIONS, cache_bytes, first_run, measure

PROBLEM = Problem(batch=6, num_blocks=3, in_block=4, out_block=5)
SQUARE = Problem(batch=6, num_blocks=3, in_block=16, out_block=16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    monkeypatch.setattr(timing, "ROUND_SECONDS", {"cpu": 1e-4, "cuda": 1e-4})
    monkeypatch.setattr(timing, "CASE_SECONDS", {"cpu": 1.5, "cuda": 30})  # tests may share a GPU


@pytest.fixture(autouse=True)
def _small_ceiling(monkeypatch):
    """A large product and a large copy take seconds."""
    monkeypatch.setattr("benchmarks.ceilings.MATRIX_SIZE", {"cpu": 64, "cuda": 64})
    monkeypatch.setattr("benchmarks.ceilings.PEAK_REPEATS", 1 << 10)
    monkeypatch.setattr("benchmarks.ceilings.CUDA_COPY_BYTES", 1 << 16)
    monkeypatch.setattr("benchmarks.ceilings.cache_bytes", lambda device: 1 << 16)


# Contestants that cannot compute a problem in a dtype: a limit of torch, or a missing package.
INAPPLICABLE = {
    "bsr": "inference only|non-square|not implemented",
    "grouped_mm": "multiple of 16|strides/sizes|Float32|requires cuBLASLt|no torch.nn|not supported",
    "packed_linear": "not installed",
    "packed_einsum": "not installed",
    "libxsmm": "needs libxsmm|float32 on one thread of a CPU only|inference only|not under autocast",
}


def compute(name, tensors):
    """A contestant's output and its gradients for x and the parameters; skips the test if unsupported."""
    x, weight, bias, grad_output = tensors
    try:
        forward, parameters = CONTESTANTS[name](weight, bias)
        parameters = [parameter.detach().clone().requires_grad_() for parameter in parameters]
        output = forward(x, *parameters)
        return output, torch.autograd.grad(output, [x, *parameters], grad_output)
    except RuntimeError as error:
        if re.search(INAPPLICABLE.get(name, "never"), str(error)):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("problem", [PROBLEM, SQUARE, Problem(1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestant(name, problem, dtype, device):
    batch, num_blocks, in_block, out_block = problem
    x = torch.randn(batch, num_blocks * in_block, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(num_blocks, out_block, in_block, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(num_blocks * out_block, dtype=dtype, device=device, requires_grad=True)
    grad_output = torch.randn(batch, num_blocks * out_block, dtype=dtype, device=device)
    expected = reference.linear(x, weight, bias)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(expected, [x, weight, bias], grad_output)
    output, grads = compute(name, (x, weight.detach(), bias.detach(), grad_output))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(grads[0], grad_x)
    # Gradients have the form of the parameters: a dense weight has zeros outside of its blocks.
    for actual, wanted in zip(grads[1:], CONTESTANTS[name](grad_weight, grad_bias)[1], strict=True):
        torch.testing.assert_close(torch.where(wanted == 0, 0, actual), wanted)


def test_bsr_infers():
    weight, bias, x = torch.randn(3, 16, 16), torch.randn(48), torch.randn(6, 48)
    with torch.no_grad():
        forward, parameters = CONTESTANTS["bsr"](weight, bias)
        torch.testing.assert_close(forward(x, *parameters), reference.linear(x, weight, bias))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
def test_measure(backward, precision, device):
    measured = measure(
        list(CONTESTANTS), SQUARE, PRECISIONS[precision], torch.device(device), backward=backward, rounds=3
    )
    assert list(measured) == list(CONTESTANTS)
    for name, entry in measured.items():
        if "skipped" in entry:
            assert re.search(INAPPLICABLE.get(name, "never"), entry["skipped"]), entry
        else:
            assert len(entry["times_us"]) == 3
            assert min(entry["times_us"]) > 0
            assert entry["peak_bytes"] >= 6 * 3 * 16 * PRECISIONS[precision].result.itemsize


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("setting", [{"mode": "graph"}, {"host": True}], ids=lambda setting: next(iter(setting)))
def test_measure_on_cuda(setting, backward, cuda):
    names = ["ours", "loop", "dense", "einsum", "bmm_out"]
    measured = measure(
        names, SQUARE, PRECISIONS["amp-float16"], torch.device(cuda), backward=backward, rounds=3, **setting
    )
    assert {name: len(entry.get("times_us", [])) for name, entry in measured.items()} == dict.fromkeys(names, 3)


def off_by_a_little(weight, bias):
    return lambda x, weight, bias: blockdiag.linear(x, weight, bias * 1.001), [weight, bias]


def without_bias_gradient(weight, bias):
    def forward(x, weight, bias):
        return blockdiag.linear(x, weight, bias.detach()) + 0 * bias

    return forward, [weight, bias]


@pytest.mark.parametrize(
    ("wrong", "backward", "message"),
    [
        (off_by_a_little, False, r"wrong is wrong on 6, 3, 4->5 .*: its output has relative error"),
        (without_bias_gradient, True, "gradient 2 has relative error 1, "),
        (lambda w, b: (lambda x, w, b: x.double(), [w, b]), False, "its output has shape"),
        (lambda w, b: (lambda x, w, b: x.new_zeros(6, 15).double(), [w, b]), False, "its output is of torch.float64"),
    ],
)
def test_wrong_contestants_are_not_timed(wrong, backward, message, monkeypatch):
    monkeypatch.setitem(CONTESTANTS, "wrong", wrong)
    measured = measure(["loop", "wrong"], PROBLEM, PRECISIONS["float32"], CPU, backward=backward, rounds=1)
    assert measured["loop"].keys() == {"times_us", "peak_bytes"}
    assert measured["wrong"].keys() == {"skipped"}
    assert re.search(message, measured["wrong"]["skipped"])
    monkeypatch.setitem(CONTESTANTS, "ours", wrong)
    measured = measure(["ours", "loop"], PROBLEM, PRECISIONS["float32"], CPU, backward=backward, rounds=1)
    assert measured["loop"].keys() == {"times_us", "peak_bytes"}
    assert re.search(message.replace("wrong is", "ours is"), measured["ours"]["failed"])


def test_failures_of_ours_are_not_skipped(monkeypatch):
    def fails(weight, bias):
        raise RuntimeError("does not work")

    for name in ("ours", "loop"):
        monkeypatch.setitem(CONTESTANTS, name, fails)
    reason = "RuntimeError: does not work"
    assert measure(["ours", "loop"], PROBLEM, PRECISIONS["float32"], CPU) == {
        "ours": {"failed": reason},
        "loop": {"skipped": reason},
    }


def test_a_failed_capture_leaves_the_stream_as_it_was(cuda, monkeypatch):
    """Otherwise the next contestant would be timed on the capture's stream, and its own capture would fail."""

    def waits(weight, bias):
        def forward(x, weight, bias):
            torch.cuda.current_stream().synchronize()  # which ends a capture
            return blockdiag.linear(x, weight, bias)

        return forward, [weight, bias]

    monkeypatch.setitem(CONTESTANTS, "waits", waits)
    before = torch.cuda.current_stream()
    names = ["ours", "waits", "loop"]
    measured = measure(names, SQUARE, PRECISIONS["float32"], torch.device(cuda), mode="graph", rounds=1)
    assert [name for name in names if "times_us" in measured[name]] == ["ours", "loop"]
    assert torch.cuda.current_stream() == before


def test_slow_contestants_run_once(monkeypatch):
    monkeypatch.setattr(timing, "CASE_SECONDS", {"cpu": 0.0})
    times = measure(["dense"], PROBLEM, PRECISIONS["float32"], CPU, rounds=5)["dense"]["times_us"]
    assert len(times) == 1
    monkeypatch.setattr(timing, "RUN_SECONDS", 0.0)
    slow = Problem(512, 8, 512, 512)
    assert "takes more than" in measure(["dense"], slow, PRECISIONS["float32"], CPU)["dense"]["skipped"]


@pytest.fixture
def choice(monkeypatch):
    """Replaces blockdiag's choice of a CUDA library; records which library computed what, and whether tuned."""
    state, seen = {"library": "cublas", "tuned": False}, []

    def preferred_blas_library(name=None):
        if name == "small_blocks":
            raise RuntimeError("no kernels for small blocks")
        state["library"] = name or state["library"]
        return state["library"]

    @contextmanager
    def tune(path=None):
        state["tuned"] = True
        yield
        state["tuned"] = False

    def ours(weight, bias):
        def forward(*tensors):
            seen.append((state["library"], state["tuned"]))
            return blockdiag.linear(*tensors)

        return forward, [weight, bias]

    monkeypatch.setattr(blockdiag.backends.cuda, "preferred_blas_library", preferred_blas_library)
    monkeypatch.setattr(blockdiag.backends, "tune", tune)
    monkeypatch.setitem(CONTESTANTS, "ours", ours)
    return seen


@pytest.mark.parametrize("name", ["ours", "ours_lt", "ours_tuned", "ours_small"])
def test_variants_compute_by_their_library(name, choice):
    """From the check to the last round; then the choice is restored."""
    entry = measure([name], PROBLEM, PRECISIONS["float32"], CPU, rounds=3)[name]
    wanted = {"ours": ("cublas", False), "ours_lt": ("cublaslt", False), "ours_tuned": ("fused", True)}
    if name == "ours_small":
        assert (entry, choice) == ({"failed": "RuntimeError: no kernels for small blocks"}, [])
    else:
        assert len(entry["times_us"]) == 3
        assert set(choice) == {wanted[name]}
        assert len(choice) >= 1 + 2 + 3
    assert blockdiag.backends.cuda.preferred_blas_library() == "cublas"


def test_variants_are_for_cuda():
    suite = make_suites("cuda")["quick"]
    names = ["ours", *LIBRARIES]
    assert [name for name in command.contestants_of(suite, "eager", "cuda", None) if "ours" in name] == names
    assert [name for name in command.contestants_of(suite, "eager", "cuda", ["ours_lt"]) if "ours" in name] == names[:2]
    assert [name for name in command.contestants_of(suite, "compiled", "cuda", None) if "ours" in name] == ["ours"]
    assert [name for name in command.contestants_of(suite, "eager", "cpu", None) if "ours" in name] == ["ours"]


def test_operands_are_rotated(monkeypatch):
    """Over just enough copies to exceed twice the cache."""
    seen = set()

    def spy(weight, bias):
        def forward(x, weight, bias):
            seen.add((x.data_ptr(), weight.data_ptr()))
            return CONTESTANTS["ours"](weight, bias)[0](x, weight, bias)

        return forward, [weight, bias]

    monkeypatch.setitem(CONTESTANTS, "spy", spy)
    operands = 4 * (6 * 12 + 3 * 5 * 4 + 15)
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2 * operands)
    measure(["spy"], PROBLEM, PRECISIONS["float32"], CPU, rounds=3)
    assert len({x for x, _ in seen}) == len({weight for _, weight in seen}) == 4
    seen.clear()
    measure(["spy"], PROBLEM, PRECISIONS["float32"], CPU, rounds=3, rotate=False)
    assert len(seen) == 1


def test_peak_memory(device):
    def step():
        torch.empty(1 << 20, device=device)
        return torch.empty(1 << 18, device=device) + 1

    assert first_run(step, torch.device(device)).peak_bytes == 4 << 20
    assert cache_bytes(torch.device(device)) >= 1 << 18


@pytest.mark.parametrize("device_name", ["cpu", "cuda"])
def test_suites(device_name):
    suites = make_suites(device_name)
    for suite in suites.values():
        assert len(set(suite.problems)) == len(suite.problems) > 0
        assert min(map(min, suite.problems)) > 0
        assert {*CONTESTANTS, *OURS} >= set(suite.contestants)
    assert suites["partitioned"].problems[0] == PUBLISHED
    assert len(suites["partitioned"].problems) == 4 * 2 * 3 * 3 + 4
    assert len(suites["ensemble"].problems) == 5 * (5 if device_name == "cpu" else 7)
