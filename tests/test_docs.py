"""Names that the documentation mentions exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/compatibility.md",
        "docs/compression.md",
        "benchmarks/results/README.md",
    )
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_tests_that_prove_compatibility():
    table = (ROOT / "docs/compatibility.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(?:\w+::)?(\w+)`", table)
    assert len(named) > 40
    for file, name in named:
        assert re.search(rf"def {name}\(", (ROOT / "tests" / file).read_text()), f"{file}::{name}"
    for file in re.findall(r"`(cpp/[\w./]+)`", table):
        assert (ROOT / "tests" / file).exists(), file
