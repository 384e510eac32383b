"""The documentation holds: links resolve, code runs, and the tests and variables that it names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/results/README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], anchor


def code_of(page: Path) -> str:
    """The Python blocks of a page, at their lines, and those in comments `<!-- run ... -->`, which readers do not see.

    A block behind a comment `<!-- not run: why -->` is left out.
    """
    lines = [""] * len(page.read_text().splitlines())
    blocks = r"^(<!-- not run: [^\n]+ -->\n)?(?:```python|<!-- run)\n(.*?)^(?:```|-->)$"
    for block in re.finditer(blocks, page.read_text(), re.MULTILINE | re.DOTALL):
        if block[1] is None:
            start = page.read_text()[: block.start(2)].count("\n")
            code = block[2].splitlines()
            lines[start : start + len(code)] = code
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page).strip()], ids=page_id)
def test_code_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code_of(page), page_id(page), "exec"), {"__name__": page.stem})


def test_the_tests_that_prove_compatibility():
    table = (ROOT / "docs/compatibility.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(?:\w+::)?(\w+)`", table)
    assert len(named) > 40
    for file, name in named:
        assert re.search(rf"def {name}\(", (ROOT / "tests" / file).read_text()), f"{file}::{name}"
    for file in re.findall(r"`(cpp/[\w./]+)`", table):
        assert (ROOT / "tests" / file).exists(), file


# How Python, C++, CMake, shell and make read a variable. setup.py reads two in a loop, and backends get their names.
READS = (
    r'environ(?:\.get\(|\[|\.setdefault\()"([A-Z]\w+)"|"([A-Z]\w+)" in os\.environ|"(FORCE_\w+)"',
    r'getenv\("([A-Z]\w+)"|(?<![\w([])"(BLOCKDIAG_\w+)"|get_env\("([A-Z]\w+)"',
    r"\$ENV\{([A-Z]\w+)\}",
    r"\$\{([A-Z]\w+):?[-=]",
    r"^([A-Z]\w+) \?=|\$\(if \$\(([A-Z]\w+)\)|\$\(([A-Z]+_ARGS)\)",
)
# Set by what starts the process, and of no use to set by hand.
OF_OTHERS = {"LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "PYTEST_XDIST_WORKER", "PYTHONPATH", "LD_PRELOAD"}
WITH_VARIABLES = ("Makefile", "setup.py", "CMakeLists.txt", "tests/conftest.py")
WITH_VARIABLES += ("blockdiag", "csrc", "cmake", "scripts", "benchmarks", "examples", "testing")


def sources() -> dict[str, str]:
    suffixes = (".py", ".cpp", ".h", ".cu", ".cmake", ".sh", ".txt", "")
    paths = [path for name in WITH_VARIABLES for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    paths = [path for path in paths if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts]
    return {page_id(path): path.read_text() for path in paths}


def test_environment_variables():
    """The table has every variable that the tree reads, and no other."""
    page = (ROOT / "docs/environment.md").read_text()
    documented = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", "\n".join(re.findall(r"^\| (.*?) \|", page, re.MULTILINE))))
    read = {
        name: path
        for path, text in sources().items()
        for groups in re.findall("|".join(READS), text, re.MULTILINE)
        for name in filter(None, groups)
    }
    assert {name: path for name, path in read.items() if name not in documented | OF_OTHERS} == {}
    text = "\n".join(sources().values())
    assert [name for name in documented if not re.search(rf"\b{name}\b", text)] == []
