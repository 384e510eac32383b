"""Every public function and class has an example in its docstring, and the examples run."""

import doctest
import importlib
import pkgutil

import pytest

import blockdiag

# An example may need a library that is not installed, or not for this PyTorch.
NEEDED = {
    "blockdiag.integrations.torch_uncertainty": "torch_uncertainty.layers.packed",
    "blockdiag.integrations.transformers": "transformers.pytorch_utils",
    "blockdiag.registration.onnx": "onnxscript",
}


def public_objects():
    """Every object in the ``__all__`` of a public module, once, under the module that defines it."""
    modules = [blockdiag] + [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(blockdiag.__path__, "blockdiag.")
        if not any(part.startswith("_") for part in info.name.split("."))
    ]
    named = [getattr(module, name) for module in modules for name in getattr(module, "__all__", ())]
    return {f"{each.__module__}.{each.__qualname__}": each for each in named if callable(each)}


OBJECTS = public_objects()


@pytest.mark.parametrize("name", OBJECTS)
def test_examples(name, tmp_path, monkeypatch):
    public = OBJECTS[name]
    tests = doctest.DocTestFinder().find(public, name, module=False, globs={})  # includes a class's methods
    assert any(test.name == name and test.examples for test in tests), "expected an example in the docstring"
    if public.__module__ in NEEDED:
        try:
            importlib.import_module(NEEDED[public.__module__])
        except Exception as error:
            pytest.skip(str(error))
    monkeypatch.chdir(tmp_path)
    for test in tests:
        failures = []
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(
            test, out=failures.append
        )
        assert not failures, "".join(failures)
