"""python -m benchmarks.sparse: contestants are checked, numbers written, goals and plots made of them."""

import pytest
import torch

from benchmarks import runs, sparse
from benchmarks.sparse import SparseProblem

SMALL = [
    SparseProblem(1, 32, 48, 16, 1, 0.1),
    SparseProblem(16, 32, 32, 16, 16, 0.1),
    SparseProblem(16, 32, 32, 8, 1, 0.5),
]


@pytest.fixture
def content(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sparse, "problems", lambda: SMALL)
    monkeypatch.setattr(sparse, "cache_bytes", lambda device: 1 << 16)
    monkeypatch.setattr("benchmarks.timing.ROUND_SECONDS", {"cpu": 1e-4})
    assert sparse.main(["--rounds", "2", "--output", str(tmp_path / "run.json")]) == 0
    return runs.load(tmp_path / "run.json")


def test_every_contestant_runs_where_it_applies(content):
    ran = {
        (str(SparseProblem(**c["problem"])), c["pass"], c["rotate"]): set(runs.times_of(c)) for c in content["cases"]
    }
    first, second, third = map(str, SMALL)
    assert ran[first, "fwd", False] == ran[first, "fwd", True] == {"ours", "dense", "ours_dense", "csr"}
    assert ran[second, "fwd", False] == {"ours", "dense", "ours_dense", "csr", "bsr"}
    assert ran[second, "fwd+bwd", False] == ran[third, "fwd+bwd", False] == {"ours", "dense", "ours_dense"}
    assert (first, "fwd+bwd", False) not in ran
    assert "int8" in ran[third, "fwd", False] or "qnnpack" not in torch.backends.quantized.supported_engines


def test_goals_and_tables(content, tmp_path, capsys):
    for case in content["cases"]:
        for name, entry in case["contestants"].items():
            entry["times_us"] = [1.0, 1.0] if name == "ours" else [5.0, 5.0]
    runs.save(content, tmp_path / "known.json")
    capsys.readouterr()
    assert sparse.main(["--show", str(tmp_path / "known.json")]) == 0
    printed = capsys.readouterr().out
    assert "batch 1 in the cache, over dense" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("16, 32->32, 8x1"))
    assert row[-6:-3] == ["1.0", "5.00", "5.00"]


def test_a_wrong_contestant_is_not_timed(monkeypatch):
    wrong = {"ours": lambda layer, problem: (lambda x, v: x.new_zeros(len(x), problem.out_features), [layer.bias])}
    monkeypatch.setattr(sparse, "CONTESTANTS", wrong)
    with pytest.raises(AssertionError, match="ours is wrong"):
        sparse.measure(SMALL[1], "fwd", torch.float32, rotate=False, rounds=1)


def test_plot(content, tmp_path):
    pytest.importorskip("matplotlib")
    for case in content["cases"]:
        case["problem"] |= {"in_features": 1024, "out_features": 1024, "out_block": 16, "in_block": 16}
    cases = [dict(case, problem={**case["problem"], "in_block": k}) for case in content["cases"] for k in (1, 4, 16)]
    sparse.plot({**content, "cases": cases}, tmp_path / "sparse.png")
    assert (tmp_path / "sparse.png").stat().st_size > 10000
