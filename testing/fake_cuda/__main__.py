"""Runs a command with two fake CUDA devices: python testing/fake_cuda COMMAND ..."""

import os
import sys
from pathlib import Path

from build import library  # Python puts the folder that it runs on the path

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    folders = {"LD_PRELOAD": library(), "PYTHONPATH": HERE / "site", "PATH": HERE / "bin"}
    known = {name: os.environ.get(name) for name in folders}
    return {
        **os.environ,
        **{name: ":".join(filter(None, [str(value), known[name]])) for name, value in folders.items()},
    }


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    os.execvpe(sys.argv[1], sys.argv[1:], environment())
