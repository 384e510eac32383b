"""The benchmark's command line, its tables, and comparisons of results."""

import json
from pathlib import Path

import pytest
from test_benchmarks import PROBLEM, SQUARE
from test_benchmarks import _short_rounds as _short_rounds
from test_benchmarks import _small_ceiling as _small_ceiling

from benchmarks import __main__ as command
from benchmarks import compare, report, runs
from benchmarks.suites import Problem, make_suites
from benchmarks.timing import measure

RESULTS = Path(__file__).parents[1] / "benchmarks/results"


@pytest.fixture
def tiny(monkeypatch):
    """Runs the command line on small problems, and returns the path of the result."""
    suites = make_suites("cpu")
    problems = [PROBLEM, SQUARE]
    tiny_suites = {name: suite._replace(problems=problems) for name, suite in suites.items()}
    monkeypatch.setattr(command, "make_suites", lambda device: tiny_suites)
    monkeypatch.setattr(command, "measure", lambda *a, **k: measure(*a, **{**k, "rounds": 3}))

    def measure_to(path, *arguments) -> int:
        return command.main(["--device", "cpu", "--precisions", "float32", "--output", str(path), *arguments])

    return measure_to


def test_command_line(tiny, tmp_path, capsys):
    path = tmp_path / "deep" / "run.json"
    assert tiny(path, "--suites", "quick", "overhead", "--contestants", "einsum", "bsr") == 0
    printed = capsys.readouterr().out
    content = runs.load(path)
    assert len(content["cases"]) == 2 * 2 * 2
    assert content["environment"]["device"] == "cpu"
    assert str(path.parent) not in path.read_text()  # results are published: no paths of a machine
    assert str(RESULTS.parents[1]) not in path.read_text()
    ceiling = content["ceilings"][0]
    assert ceiling["operations_per_second"] > 0
    assert ceiling["bytes_per_second"] == max(ceiling["read_bytes_per_second"], ceiling["copy_bytes_per_second"]) > 0
    case = content["cases"][0]
    assert list(case["contestants"]) == ["ours", "loop", "bsr", "einsum"]
    assert "skipped" in case["contestants"]["bsr"]
    assert len(case["contestants"]["ours"]["times_us"]) == 3

    assert command.main(["--show", str(path)]) == 0
    assert capsys.readouterr().out == printed
    assert "bsr not run at 2: inference only" in printed
    assert f"  {ceiling['instruction_set'] or 'GEMM'}  " in printed
    assert "quick: float32, fwd+bwd, eager" in printed
    assert command.main(["--show", str(path), "--markdown"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert "| B, G, K→N | float32, fwd | float32, fwd+bwd |" in table
    assert command.main(["--show", str(path), "--markdown", "--suites", "overhead:float32", "--passes", "fwd"]) == 0
    part = capsys.readouterr().out
    assert "| B, G, K→N | float32, fwd |\n" in part
    assert "quick" not in part
    assert any(line.startswith("| 6, 3, 4→5 | ") and line.count("(") == 2 for line in table)


def test_older_results(tmp_path, capsys):
    """Their ceilings are a GEMM's rate and the bandwidth of a copy."""
    content = runs.load(RESULTS / "zen4.json")
    fields = ("dtype", "threads", "operations_per_second", "bytes_per_second")
    older = [{name: ceiling[name] for name in fields} for ceiling in content["ceilings"]]
    runs.save({**content, "ceilings": older}, tmp_path / "older.json")
    assert command.main(["--show", str(tmp_path / "older.json")]) == 0
    lines = capsys.readouterr().out.partition("ceilings of the machine:\n")[2].splitlines()[1:]
    expected = [["float32", "2", "GEMM", "-", f"{1e-9 * older[0]['bytes_per_second']:.4g}"]]
    assert [[*line.split()[:2], *line.split()[3:]] for line in lines] == expected


def test_plots(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.json"
    assert (
        tiny(path, "--suites", "quick", "ensemble", "partitioned", "scaling", "--contestants", "einsum", "--plots") == 0
    )
    names = {plot.name for plot in tmp_path.glob("run-*.png")}
    assert len(names) == 3 * 2 + 1
    elsewhere = tmp_path / "plots"
    assert command.main(["--show", str(path), "--plots", str(elsewhere)]) == 0
    assert {plot.name for plot in elsewhere.glob("*.png")} == names
    assert all(plot.stat().st_size < 150_000 for plot in elsewhere.glob("*.png"))


def test_compare(tiny, tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    assert tiny(old, "--contestants", "loop") == 0
    show = ["--show", str(new), "--compare", str(old)]

    def doctored(factor, **environment):
        content = json.loads(old.read_text())
        content["environment"].update(environment)
        ours = content["cases"][1]["contestants"]["ours"]
        ours["times_us"] = [factor * time_us for time_us in ours["times_us"]]
        new.write_text(json.dumps(content))
        return command.main(show)

    assert doctored(1) == 0
    assert "4 cases, 0 slower" in capsys.readouterr().out
    assert doctored(0.1) == 0
    assert doctored(100, driver="1.2") == 1
    captured = capsys.readouterr()
    assert "4 cases, 1 slower" in captured.out
    assert "quick 6, 3, 4->5, float32, fwd+bwd, eager" in captured.out
    assert "driver: None -> 1.2" in captured.err
    with pytest.raises(SystemExit, match="2"):
        doctored(1, device="cuda")
    assert "nothing to compare" in capsys.readouterr().err


def test_a_drifting_machine_is_no_regression():
    def content(*, ours, loop):
        case = {"suite": "quick", "problem": PROBLEM._asdict(), "precision": "float32", "pass": "fwd", "mode": "eager"}
        contestants = {"ours": {"times_us": ours}, "loop": {"times_us": loop}}
        return {"environment": {}, "cases": [{**case, "threads": 1, "contestants": contestants}]}

    old = content(ours=[1.0, 1.01, 1.02, 1.03], loop=[2.0, 2.0, 2.0, 2.0])
    assert compare.compare(old, content(ours=[3.0, 6.0, 3.0, 3.0], loop=[6.0, 12.0, 6.0, 6.0]))[1] == []
    assert (
        compare.compare(old, content(ours=[1.0, 1.0, 1.5, 1.5], loop=[2.0, 2.0, 2.0, 2.0]))[1] == []
    )  # ranges overlap
    assert compare.compare(old, content(ours=[1.05, 1.05, 1.05, 1.05], loop=[2.0, 2.0, 2.0, 2.0]))[1] == []  # 3 %
    assert len(compare.compare(old, content(ours=[1.2, 1.2, 1.2, 1.2], loop=[2.0, 2.0, 2.0, 2.0]))[1]) == 1


def test_summary():
    def case(ours, loop, dense):
        contestants = {"ours": {"times_us": ours}, "loop": {"times_us": loop}, "dense": {"times_us": dense}}
        setting = {"suite": "quick", "precision": "float32", "pass": "fwd", "mode": "eager", "threads": 1}
        problem = Problem(128, len(ours), 256, 256)
        return {**setting, "problem": problem._asdict(), "floor_us": 1.0, "contestants": contestants}

    cases = [case([2.0], [4.0], [1.0]), case([2.0, 4.0], [16.0, 32.0], [4.0, 8.0])]
    lines = [" ".join(line.split()) for line in report.summary({"cases": cases, "ceilings": []}).splitlines()]
    assert "quick float32 fwd eager 1 2 1.00 0.50 128, 1, 256->256 (dense)" in lines  # 0.5 and 2
    assert "quick float32 fwd eager 1 2 4.00 2.00 128, 1, 256->256" in lines  # the loop: 2 and 8
    assert lines.count("quick float32 fwd eager 1 2 0.41 0.33 128, 2, 256->256") == 2  # the floor: 1/2 and 1/3


def test_suites_of_a_cpu_are_not_for_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(SystemExit, match="2"):
        command.parse_arguments(["--suites", "quick", "libxsmm"])
    assert "--suites libxsmm needs --device cpu" in capsys.readouterr().err


def test_the_commit_comes_from_the_environment_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("BLOCKDIAG_COMMIT", "1234567")
    assert command.commit() == "1234567"


def test_suites_have_precisions_of_their_own(tiny, tmp_path):
    path = tmp_path / "run.json"
    assert tiny(path, "--suites", "small", "quick:bfloat16,float32", "--passes", "fwd", "--contestants", "loop") == 0
    measured = [(case["suite"], case["precision"]) for case in runs.load(path)["cases"]]
    # In the given order, the most telling first; both problems of each.
    assert list(dict.fromkeys(measured)) == [("small", "float32"), ("quick", "bfloat16"), ("quick", "float32")]


def test_markdown_has_a_column_for_each_mode(tiny, tmp_path, capsys):
    path = tmp_path / "run.json"
    assert tiny(path, "--suites", "quick", "--passes", "fwd", "--contestants", "loop") == 0
    content = runs.load(path)
    graph = [{**case, "mode": "graph"} for case in content["cases"]]
    runs.save({**content, "cases": content["cases"] + graph}, path)
    capsys.readouterr()
    assert command.main(["--show", str(path), "--markdown"]) == 0
    table = capsys.readouterr().out
    assert "quick, eager and graph, " in table
    assert "| B, G, K→N | float32, fwd, eager | float32, fwd, graph |" in table
    assert command.main(["--show", str(path), "--markdown", "--modes", "graph"]) == 0
    assert "| B, G, K→N | float32, fwd |" in capsys.readouterr().out


def test_interrupted_runs_keep_their_results(tiny, tmp_path, monkeypatch):
    path, counter = tmp_path / "run.json", iter(range(10))

    def interrupted(*arguments, **keywords):
        if next(counter) == 2:
            raise KeyboardInterrupt
        return measure(*arguments, **keywords)

    monkeypatch.setattr(command, "measure", interrupted)
    assert tiny(path, "--contestants", "loop") == 130
    assert len(runs.load(path)["cases"]) == 2


def test_results_are_written_while_measuring(tiny, tmp_path, monkeypatch):
    path, written = tmp_path / "run.json", []
    monkeypatch.setattr(command, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(runs, "save", lambda content, path: written.append(len(content["cases"])))
    assert tiny(path, "--contestants", "loop", "--passes", "fwd") == 0
    assert written == [1, 2, 2]


def test_cases_beyond_the_time_limit_are_named(tiny, tmp_path):
    path = tmp_path / "run.json"
    assert tiny(path, "--max-minutes", "1e-9") == 0
    content = runs.load(path)
    assert content["cases"] == []
    assert [case["pass"] for case in content["left_out"]] == ["fwd", "fwd+bwd"] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "must be positive, but got 0"),
        (["--modes", "graph", "--device", "cpu"], "graph needs --device cuda"),
        (["--show", "missing.json"], "cannot read missing.json"),
        (["--compare", "pyproject.toml"], "cannot read pyproject.toml"),
        (["--output", "/proc/nowhere/run.json"], "cannot write to"),
        (["--output", "/"], "Is a directory"),
        (["--plots"], "--plots needs a DIR"),
        (["--contestants", "nobody"], "invalid choice: 'nobody'"),
        (["--suites", "nothing"], "invalid choice: 'nothing'"),
        (["--suites", "quick:float33"], "invalid choice: 'float33'"),
        (["--goals", "missing.json"], "cannot read missing.json"),
    ],
)
def test_bad_command_lines(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(command, "measure", lambda *a, **k: pytest.fail("measured before the arguments were checked"))
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err
