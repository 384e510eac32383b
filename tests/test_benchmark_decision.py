"""Choosing a GPU library by a result: on synthetic results."""

import json

from test_benchmark_goals import made_up, make

from benchmarks import __main__ as command
from benchmarks import decision

SETTING = {"suite": "decision", "mode": "graph"}


def verdict(cases, what):
    """The numbers and the conclusion of one row."""
    rows = [line for line in decision.verdicts(cases).splitlines() if line.startswith(what)]
    return [row.removeprefix(what).split("  ")[-1].strip() for row in rows]


def case(size, *, precision="float16", **contestants):
    return make((128, 16, size, size), precision=precision, **SETTING, **contestants)


def test_winner_of_each_problem():
    table = decision.table(
        [
            case(64, ours_cublas=6, ours_lt=5, ours_small=2.5, loop=40, bmm_out=7.5),
            case(1024, ours_cublas=6, ours_lt=5, loop=4, precision="amp-float16"),
        ]
    )
    rows = [" ".join(line.split()) for line in table.splitlines()]
    assert rows[0] == (
        "B, G, K->N precision pass ours_cublas ours_lt ours_small loop bmm_out floor winner "
        "/ours_cublas /ours_lt /other other"
    )
    assert rows[1] == "128, 16, 64->64 float16 fwd 6 5 2.5 40 7.5 1 ours_small 2.40 2.00 3.00 bmm_out"
    assert rows[2] == "128, 16, 1024->1024 amp-float16 fwd 6 5 - 4 - 1 ours_lt 1.20 1.00 0.80 loop"


def test_small_blocks_stay_where_they_gain_enough():
    cases = [
        case(16, ours_lt=2, ours_small=1),
        case(32, ours_lt=1.2, ours_small=1),
        case(64, ours_lt=1.31, ours_small=1),
        case(128, ours_lt=1, ours_small=10),  # ours_small does not compute it
    ]
    assert verdict(cases, "small_blocks / cublaslt up to 16") == ["keep"]
    assert verdict(cases, "small_blocks / cublaslt up to 32") == ["drop"]
    assert verdict(cases, "small_blocks / cublaslt up to 64") == ["keep"]


def test_what_is_fused_counts_where_it_was_measured():
    cases = [case(64, ours_lt=2, ours_fused=1.2, ours_tuned=1, ours_small=1)]
    assert verdict(cases, "fused / cublaslt") == ["fused"]
    assert verdict(cases, "small_blocks / fused up to 64") == ["drop"]
    assert verdict(cases, "tuned / fused") == ["tune by default"]


def test_tuning_is_on_request_unless_a_suite_gains():
    assert verdict([case(64, ours_lt=1.05, ours_tuned=1)], "tuned") == ["tune on request"]
    cases = [case(64, ours_lt=1.5, ours_tuned=1), case(128, ours_lt=0.9, ours_tuned=1)]
    assert verdict(cases, "tuned") == ["tune by default"]
    cases += [case(64, ours_lt=1, ours_tuned=1, precision="amp-float16")]
    assert verdict(cases, "tuned") == ["tune by default", "tune on request"]


def test_cublas_faster_than_cublaslt_is_said():
    assert verdict([case(64, ours_cublas=1, ours_lt=0.9)], "cublaslt") == ["cublaslt"]
    assert verdict([case(64, ours_cublas=0.9, ours_lt=1)], "cublaslt") == ["cublas: look why"]


def test_splitting_long_sums():
    assert verdict([case(32, ours_small=1, ours_unsplit=1.2, which="fwd+bwd")], "split") == ["split"]
    assert verdict([case(32, ours_small=1.2, ours_unsplit=1, which="fwd+bwd")], "split") == ["do not split"]
    assert verdict([case(32, ours_small=1.2, ours_unsplit=1)], "split") == []  # there are none


def test_command_shows_what_failed_and_what_is_missing(tmp_path, capsys):
    """An interrupted run with a wrong variant still decides what it can."""
    broken = case(64, ours=6, loop=40)
    broken["contestants"]["ours_lt"] = {"failed": "AssertionError: ours_lt is wrong"}
    content = {**made_up([broken]), "left_out": [case(32), case(128)]}
    path = tmp_path / "decision.json"
    path.write_text(json.dumps(content))
    assert command.main(["--decide", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "ours_lt FAILED at 1: AssertionError: ours_lt is wrong" in printed
    assert "Left out for lack of time: 2 of decision, float16, fwd, graph" in printed
    assert "cublaslt / cublas" not in printed
