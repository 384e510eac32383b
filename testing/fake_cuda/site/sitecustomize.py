"""On PYTHONPATH (see ../__main__.py): lets ../aten.py compute ATen's ops in every program that imports torch."""

import atexit
import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path


class _AfterTorch:
    """A finder that delegates to the others, and installs the ops once torch is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        run = spec.loader.exec_module

        def run_and_install(module):
            run(module)
            sys.path.append(str(Path(__file__).parents[2]))
            from fake_cuda.aten import fake

            # Autograd's threads release tensors slightly after the results arrive. At exit they can no longer take
            # the GIL, which Python's tensors need, and would abort().
            atexit.register(time.sleep, 0.1)
            if not fake.get("dry") and not fake.get("nothing"):
                fake.install()

        spec.loader.exec_module = run_and_install
        return spec


if "libfake_cuda" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, _AfterTorch())
