"""Loading, the environment report, and messages about mismatches."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import blockdiag

ROOT = Path(__file__).parent.parent


def run(*command, cwd=None, **environment):
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def test_version_stands_in_one_file():
    version = (ROOT / "VERSION").read_text().strip()
    assert blockdiag.__version__ == version
    others = [ROOT / name for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "blockdiag/__init__.py")]
    assert not any(version in path.read_text() for path in others)


def test_import_exposes_what_it_says():
    """Only the names of ``__all__``: no helpers, and no modules imported along the way."""
    code = """if True:
        import blockdiag
        assert [name for name in dir(blockdiag) if not name.startswith("_")] == sorted(blockdiag.__all__)
        for each in (getattr(blockdiag, name) for name in blockdiag.__all__):
            assert getattr(each, "__module__", each.__name__).partition(".")[0] == "blockdiag"
        for package in (blockdiag.ensemble, blockdiag.nn, blockdiag.functional, blockdiag.compression):
            assert all(hasattr(package, name) for name in package.__all__)
        for layer in blockdiag.nn.__all__:
            assert getattr(blockdiag, layer) is getattr(blockdiag.nn, layer)
    """
    result = run(sys.executable, "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_imported_again(tmp_path):
    """As Jupyter's autoreload and pytest plugins do: each module reloaded, then all deleted and imported again."""
    code = """if True:
        import importlib, sys, warnings
        import torch, blockdiag, blockdiag.distributed
        from blockdiag.integrations import torch_uncertainty
        from torch.utils.flop_counter import FlopCounterMode

        def check(blockdiag):
            x, weights = torch.randn(3, 12), torch.randn(5, 4, 2, 3)
            torch.vmap(blockdiag.linear, (None, 0))(x, weights)
            with FlopCounterMode(display=False) as counter:
                blockdiag.BlockDiagLinear(12, 8, 4)(x)
            assert counter.get_total_flops() == 2 * 3 * 4 * 2 * 3

        names = [name for name in sys.modules if name.partition(".")[0] == "blockdiag"]
        for name in names * 2:
            importlib.reload(sys.modules[name])
        check(importlib.reload(blockdiag))
        finders = len(sys.meta_path)
        for name in names:
            del sys.modules[name]
        again = importlib.import_module("blockdiag")
        assert again is not blockdiag
        importlib.import_module("blockdiag.distributed")
        check(again)
        check(blockdiag)
    """
    tuning = str(tmp_path / "tuning.json")
    result = run(sys.executable, "-W", "error:duplicate", "-c", code, cwd=tmp_path, BLOCKDIAG_TUNE=tuning)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("there is nothing to tune") <= 1  # for the environment variable once, not at each import


def test_version_of_the_installed_package():
    """It includes the torch that the package was built for, and whether with CUDA."""
    try:
        installed = importlib.metadata.version("torch-blockdiag")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, and not installed")
    release = ".".join(torch.__version__.split(".")[:2])
    with_cuda = blockdiag.build_info()["cuda"] != "none"
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if with_cuda else "cpu"
    assert installed == f"{blockdiag.__version__}+pt{release}{cuda}"


def test_report():
    result = run(sys.executable, "-m", "blockdiag")
    assert result.returncode == 0, result.stderr
    for expected in (blockdiag.__version__, torch.__version__, blockdiag.build_info()["cpu_gemm"], "GPUs:"):
        assert expected in result.stdout


@pytest.fixture
def copied_package(tmp_path):
    """A copy of the package to damage, and a function that imports it."""
    package = tmp_path / "blockdiag"
    shutil.copytree(Path(blockdiag.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))

    def import_it():
        result = run(sys.executable, "-c", "import blockdiag; print(blockdiag.__file__)", cwd=tmp_path, PYTHONPATH="")
        assert result.returncode == 0 or "ImportError: " in result.stderr, result.stderr
        return result.stdout + result.stderr.rpartition("ImportError: ")[2]

    assert str(package) in import_it()
    (module,) = package.glob("_C*.so")
    return module, import_it


def test_missing_module(copied_package):
    module, import_it = copied_package
    module.unlink()
    assert re.match(
        r"blockdiag's compiled module is missing from .*pip install --no-build-isolation", import_it(), re.S
    )


def test_built_for_another_torch(copied_package):
    """The module is rejected by the version that it was built for before it is loaded, as it could crash."""
    module, import_it = copied_package
    built_for = blockdiag.build_info()["torch"]
    other = "1" + built_for[1:]
    data = module.read_bytes()
    old, new = (f"blockdiag was built for torch {version}".encode() for version in (built_for, other))
    assert data.count(old) == 1
    module.write_bytes(data.replace(old, new))
    message = import_it()
    assert message.startswith(
        f"blockdiag was built for torch {other}, but this environment has torch {torch.__version__}"
    )
    assert "pip install --no-build-isolation" in message


def test_module_that_does_not_load(copied_package):
    module, import_it = copied_package
    module.write_bytes(b"not a library")
    message = import_it()
    assert message.startswith(f"blockdiag's compiled module cannot be loaded beside torch {torch.__version__}: ")
    assert "pip install --no-build-isolation" in message


def report_of(folder):
    """The output of `python -m blockdiag` in a folder, and its exit status."""
    result = run(sys.executable, "-m", "blockdiag", cwd=folder, PYTHONPATH="")
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout, result.returncode


def test_report_where_the_import_fails(copied_package):
    """For another torch, and for a damaged or missing module."""
    module, _ = copied_package
    folder = module.parent.parent
    built_for = blockdiag.build_info()["torch"].encode()
    whole = module.read_bytes()
    damaged = whole.replace(b"was built for torch " + built_for, b"was built for torch 1" + built_for[1:])
    for data, problem in ((damaged, "blockdiag was built for torch 1"), (b"", "compiled module cannot be loaded")):
        module.write_bytes(data)
        output, status = report_of(folder)
        assert status == 1
        assert f"blockdiag cannot be imported: {'' if data else 'blockdiag' + chr(39) + 's '}{problem}" in output
        assert module.name in output
        assert torch.__version__ in output
    module.unlink()
    output, status = report_of(folder)
    assert status == 1
    assert re.search(
        "compiled modules: +none.*cannot be imported: blockdiag's compiled module is missing", output, re.S
    )


def test_report_without_torch(copied_package, tmp_path):
    """No torch, and one whose libraries are missing."""
    broken = tmp_path / "torch"
    broken.mkdir()
    for raised, said in (
        ("ModuleNotFoundError('No torch', name='torch')", "needs torch, and this environment has none"),
        ("OSError('libcudart.so.13: cannot open')", "this environment's cannot be imported: libcudart.so.13"),
    ):
        (broken / "__init__.py").write_text(f"raise {raised}")
        output, status = report_of(tmp_path)
        assert status == 1
        assert said in output


def test_source_folder_before_the_installed_package(copied_package, tmp_path):
    """After `pip install .`, in the clone: the report covers the installed package; the import error explains why."""
    module, _ = copied_package
    sources = tmp_path / "sources"
    (sources / "csrc").mkdir(parents=True)
    (sources / "setup.py").touch()
    shutil.copytree(module.parent, sources / "blockdiag", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    for command, expected in ((["-m", "blockdiag"], 0), (["-c", "import blockdiag"], 1)):
        result = run(sys.executable, *command, cwd=sources, PYTHONPATH=str(tmp_path))
        assert result.returncode == expected, result.stderr
        if expected == 0:
            assert f"imported from {module.parent}\n" in result.stdout
        else:
            assert f"before the installed package in {module.parent}. Run Python in another folder" in result.stderr
    # Installing the package elsewhere does not replace a module beside the sources.
    shutil.copy(module, sources / "blockdiag")
    (sources / "blockdiag" / module.name).write_bytes(b"not a library")
    result = run(sys.executable, "-c", "import blockdiag", cwd=sources, PYTHONPATH=str(tmp_path))
    assert "pip install --no-build-isolation --no-deps --editable ." in result.stderr


@pytest.mark.parametrize("init", [None, '__version__ = "3.0.0"\n'], ids=["uninstalled", "installed over ours"])
@pytest.mark.parametrize(
    "command", [["-m", "blockdiag"], ["-c", "from blockdiag.nn.block_diag_linear import BlockDiagLinear"]]
)
def test_the_other_blockdiag(copied_package, init, command):
    """The package that draws diagrams has overwritten our __init__.py, or removed it when uninstalled."""
    module, _ = copied_package
    path = module.parent / "__init__.py"
    path.unlink() if init is None else path.write_text(init)
    result = run(sys.executable, *command, cwd=module.parent.parent, PYTHONPATH="")
    assert result.returncode == 1
    said = result.stdout if command[0] == "-m" else result.stderr
    assert "draws diagrams" in said
    assert re.search("pip uninstall blockdiag\n.*pip install .* torch-blockdiag", said, re.S)


def without_torch(code, cwd):
    """Runs `code` in an interpreter that finds the standard library and setuptools, but no torch."""
    hide = "import sys; sys.modules['torch'] = None; sys.path.insert(0, '.'); "
    return run(sys.executable, "-c", hide + code, cwd=cwd)


def test_import_without_torch():
    result = without_torch("import blockdiag", ROOT)
    assert "ImportError: blockdiag needs torch, and this environment has none." in result.stderr


def test_build_without_torch():
    """setup.py in an isolated build."""
    hide = (
        "import importlib.util as u, runpy; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
        "runpy.run_path('setup.py')"
    )
    result = run(sys.executable, "-c", hide, cwd=ROOT)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "this environment has none" in result.stderr
    assert "pip install --no-build-isolation ." in result.stderr
    assert "pip install --no-build-isolation torch-blockdiag" in result.stderr


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("pip-build-env-1a2b/overlay", "pip is building in isolation"),
        ("build-env-1a2b", "this is an isolated build"),
        ("builds-v0/.tmp1a2b", "this is an isolated build"),
    ],
    ids=["pip", "build", "uv"],
)
def test_isolated_build(tmp_path, folder, said):
    """The build environment has no torch, which says nothing about the user's."""
    code = (
        "import importlib.util as u, runpy; find = u.find_spec; "
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest); "
        "import sys; sys.argv = ['setup.py', 'dist_info']; runpy.run_path('setup.py')"
    )
    (tmp_path / folder).mkdir(parents=True)
    result = run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(tmp_path / folder))
    assert result.returncode == 1
    assert said in result.stderr
    assert "has none" not in result.stderr


@pytest.mark.parametrize("force_cuda", ["0", "1"])
def test_nvcc_of_another_major_version(tmp_path, force_cuda):
    """The error names both versions and the CPU build, before torch compares them. Another minor version is fine."""
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    code = (
        "import torch, runpy, sys; torch.version.cuda = '13.0'; sys.argv = ['setup.py', '--version']; "
        "runpy.run_path('setup.py')"
    )

    def version(nvcc_version, **environment):
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {nvcc_version}, V{nvcc_version}.1\n")
        nvcc.chmod(0o755)
        variables = {"CUDA_HOME": str(tmp_path), "FORCE_CUDA": force_cuda, **environment}
        return run(sys.executable, "-c", code, cwd=ROOT, **variables)

    result = version("12.8")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert re.search(rf"has CUDA 13\.0, but nvcc in {tmp_path} is of CUDA 12\.8.*FORCE_CPU=1", result.stderr, re.S)
    assert "building CUDA and CPU (" in version("13.1").stdout
    assert "building CPU only (FORCE_CPU=1)" in version("12.8", FORCE_CUDA="0", FORCE_CPU="1").stdout


def test_contradicting_build_switches():
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, FORCE_CUDA="1", FORCE_CPU="1")
    assert result.returncode == 1
    assert "FORCE_CUDA=1 and FORCE_CPU=1 contradict each other" in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_force_cuda_without_a_cuda_torch():
    result = run(sys.executable, "setup.py", "--version", cwd=ROOT, FORCE_CUDA="1")
    assert result.returncode == 1
    assert re.search(r"FORCE_CUDA=1, but torch .* was built without CUDA", result.stderr)


@pytest.mark.parametrize("gemm", ["aten", "mkl", "avx2", "avx512", "avx512_bf16"])
def test_every_cpu_gemm(gemm):
    """Every CPU library gives the same results: repeats the tests of values and layouts."""
    chosen = run(
        sys.executable, "-c", "import blockdiag; print(blockdiag.build_info()['cpu_gemm'])", BLOCKDIAG_CPU_GEMM=gemm
    )
    if chosen.returncode != 0:
        assert "expected BLOCKDIAG_CPU_GEMM to be one of [aten" in chosen.stderr
        pytest.skip(f"{gemm} is not for this CPU or this torch")
    assert chosen.stdout.split()[0] == gemm
    if chosen.stdout.strip() == blockdiag.build_info()["cpu_gemm"]:
        pytest.skip(f"{gemm} is what all tests run on")
    files = ("test_linear.py", "test_random.py", "test_memory.py", "test_bounds.py")
    sparse = ("test_values_and_gradients", "test_diagonal", "test_nothing_is_read_beyond_the_operands")
    tests = [str(ROOT / "tests" / name) for name in (*files, *(f"test_sparse_linear.py::{test}" for test in sparse))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not cuda", *tests]
    result = run(*command, cwd=ROOT, BLOCKDIAG_CPU_GEMM=gemm)
    assert result.returncode == 0, result.stdout[-3000:]


def test_unknown_cpu_gemm():
    result = run(sys.executable, "-c", "import blockdiag; blockdiag.build_info()", BLOCKDIAG_CPU_GEMM="fast")
    assert result.returncode != 0
    assert re.search(r'BLOCKDIAG_CPU_GEMM to be one of \[aten.*\] on this CPU, but got "fast"', result.stderr)
