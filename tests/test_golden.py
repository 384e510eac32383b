"""State dicts saved by older versions still load, and give the same outputs.

``golden/NAME.pt`` holds the state dict of a module of ``every_module.py``, inputs, and the outputs in eval mode. A new
module gets its file by ``PYTHONPATH=.:tests python tests/test_golden.py NAME`` once its state dict is settled. A
committed file never changes: a module that changes must still load the old state dict.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

from every_module import CASES, initialized

FOLDER = Path(__file__).parent / "golden"
NAMES = [name for name in CASES if name != "a compressed model"]  # not a module of its own


def path_of(name):
    return FOLDER / f"{re.sub('[^A-Za-z0-9]+', '_', name)}.pt"


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_saved_modules_load(name, assign):
    saved = torch.load(path_of(name), weights_only=True)
    module = CASES[name].make(device="meta" if assign else "cpu")
    module.load_state_dict(saved["state_dict"], assign=assign)
    torch.testing.assert_close(module.eval()(*saved["inputs"]), saved["output"])


def test_no_file_is_left_over():
    assert {path_of(name) for name in NAMES} == set(FOLDER.glob("*.pt"))


def save(name):
    """Writes the file of a new module, with running statistics of one batch."""
    torch.manual_seed(0)
    module = initialized(CASES[name]).train()
    with torch.no_grad():
        module(*CASES[name].inputs(4))
        inputs = CASES[name].inputs(2)
        content = {"state_dict": module.state_dict(), "inputs": inputs, "output": module.eval()(*inputs)}
    with path_of(name).open("xb") as file:  # fails if the file exists
        torch.save(content, file)


if __name__ == "__main__":
    save(sys.argv[1])
