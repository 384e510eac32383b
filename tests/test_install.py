"""Building and installing as users do: sdist, wheel, from either, editable, after torch was replaced, by make.

In separate environments, without network and in seconds: a stand-in for the compiler runs the preprocessor, to check
that every header exists, and "links" by copying the module that these tests run with, which make has compiled.
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import blockdiag
from blockdiag._load import compiled_module

ROOT = Path(__file__).parent.parent
VERSION = (ROOT / "VERSION").read_text().strip()
RELEASE = ".".join(torch.__version__.split(".")[:2])
pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git clone: git knows what are sources")
# Variables of `make test` that must not reach these builds.
OF_THE_CALLER = ("PYTHONPATH", "FORCE_CUDA", "TORCH", "VENV", "CMAKE_ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
LOCAL = f"{VERSION}+pt{RELEASE}cpu"
COMPILER = """#!{python}
import os, shutil, subprocess, sys
arguments = sys.argv[1:]
if "--version" in arguments:
    print(open({folder!r} + "/version").read())
elif "-c" in arguments:
    output = arguments[arguments.index("-o") + 1]
    with open({folder!r} + "/compiled", "a") as log:
        print(output, file=log)
    open(output, "w").close()
    if "-MF" in arguments:
        open(arguments[arguments.index("-MF") + 1], "w").write(output + ":\\n")
    if os.path.exists({folder!r} + "/preprocess"):
        if "-MF" in arguments:
            arguments = [word for word in arguments if word not in ("-MMD", "-MF", output + ".d")]
        arguments[arguments.index("-o") + 1] = "/dev/null"
        sys.exit(subprocess.call(["c++", "-E", *(word for word in arguments if word != "-c")]))
elif "-shared" in arguments:
    shutil.copy({module!r}, arguments[arguments.index("-o") + 1])
else:
    sys.exit(subprocess.call(["c++", *arguments]))
"""


class Place:
    """A copy of the sources, a stand-in for the compiler, and environments with and without torch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources = folder / "sources"
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        self.files = {name for name in names if (ROOT / name).exists()}
        for name in self.files:
            (self.sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.sources / name)

        self.compiler = folder / "c++"
        module = compiled_module(Path(blockdiag.__file__).parent)
        self.compiler.write_text(COMPILER.format(python=sys.executable, folder=str(folder), module=str(module)))
        self.compiler.chmod(0o755)
        (folder / "version").write_text("1.0")

        self.python = self.environment("env")
        self.without_torch = self.environment("env-without-torch", hidden=r"torch(gen)?\b|functorch")
        # A torch that can be replaced in-place, with files older than every object.
        self.torch = folder / "env-packages/torch"
        original = self.torch.resolve()
        self.torch.unlink()
        self.torch.mkdir()
        for path in original.iterdir():
            if path.name not in ("version.py", "__pycache__"):
                (self.torch / path.name).symlink_to(path)
        shutil.copy(original / "version.py", self.torch)
        self.replace_torch("", "")

    def environment(self, name: str, hidden: str = r"\Z") -> Path:
        """An environment with the packages of this one, except ours and `hidden`. Returns its Python."""
        packages = self.folder / f"{name}-packages"
        packages.mkdir()
        for site in filter(lambda entry: entry.endswith(("site-packages", "dist-packages")), sys.path):
            for path in Path(site).iterdir():
                ours = re.match(r".*(blockdiag|__editable__|\.pth$|__pycache__)|" + hidden, path.name)
                if not ours and not (packages / path.name).exists():
                    (packages / path.name).symlink_to(path)
        run(sys.executable, "-m", "venv", "--without-pip", self.folder / name)
        (site,) = (self.folder / name / "lib").glob("python*/site-packages")
        (site / "packages.pth").write_text(f"{packages}\n")
        return self.folder / name / "bin/python"

    def replace_torch(self, old: str, new: str) -> None:
        path = self.torch / "version.py"
        path.write_text(path.read_text().replace(old, new))
        os.utime(path, (0, 0))

    def compiled(self) -> int:
        """The number of objects compiled since the last call."""
        log = self.folder / "compiled"
        lines = log.read_text().splitlines() if log.exists() else []
        log.write_text("")
        return len(lines)

    def pip(self, *arguments: object, **environment: str) -> str:
        return self.run(self.python, "-m", "pip", *arguments, cwd=self.sources, **environment)

    def run(self, *command: object, **kwargs) -> str:
        path = os.pathsep.join([str(self.python.parent), os.environ["PATH"]])
        variables = {"CC": str(self.compiler), "CXX": str(self.compiler), "FORCE_CPU": "1", "PATH": path}
        variables |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INDEX": "1"}
        return run(*command, **{**variables, **kwargs})


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    variables = {key: value for key, value in os.environ.items() if key not in OF_THE_CALLER}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("install"))


@pytest.fixture(scope="module")
def sdist(place):
    """An sdist built with the hooks that `python -m build --sdist` calls, without torch."""
    hooks = "from setuptools import build_meta as b; b.get_requires_for_build_sdist(); print(b.build_sdist('dist'))"
    lines = run(place.without_torch, "-c", hooks, cwd=place.sources).splitlines()
    return place.sources / "dist" / lines[-1]


def check_installed(place, version: str, expected_folder: Path) -> None:
    """The package is installed with this version, is imported from that folder, and computes."""
    code = (
        "import blockdiag, torch, importlib.metadata as m; "
        "print(m.version('torch-blockdiag'), blockdiag.__version__, blockdiag.__file__); "
        "print(blockdiag.BlockDiagLinear(4, 2, 2)(torch.ones(1, 4)).shape)"
    )
    lines = place.run(place.python, "-c", code, cwd=place.folder).splitlines()
    assert lines == [f"{version} {VERSION} {expected_folder}/blockdiag/__init__.py", "torch.Size([1, 2])"]


def site(place) -> Path:
    (folder,) = (place.folder / "env/lib").glob("python*/site-packages")
    return folder


def test_sdist_has_everything(place, sdist):
    assert sdist.name == f"torch_blockdiag-{VERSION}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
        info = archive.extractfile(f"torch_blockdiag-{VERSION}/PKG-INFO").read().decode()
    made = {"PKG-INFO", "setup.cfg", *(name for name in names if ".egg-info/" in name)}
    assert names - made == {name for name in place.files if not name.startswith(".")}
    assert f"\nVersion: {VERSION}\n" in info
    assert "\nRequires-Dist: torch>=2.11\n" in info


def test_sdist_beside_torch_is_the_same(place, sdist, tmp_path):
    """It names neither the installed torch's version nor CUDA."""
    hooks = f"from setuptools import build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    assert run(place.python, "-c", hooks, cwd=place.sources).splitlines()[-1] == sdist.name
    contents = []
    for path in (sdist, tmp_path / sdist.name):
        with tarfile.open(path) as archive:
            contents.append(archive.extractfile(f"torch_blockdiag-{VERSION}/PKG-INFO").read())
    assert contents[0] == contents[1]


def test_wheel_is_not_built_without_torch(place):
    """Neither by a command that does not otherwise need torch, nor together with an sdist."""
    for arguments in (["bdist_wheel"], ["sdist", "bdist_wheel"], ["dist_info"]):
        with pytest.raises(AssertionError, match="compiled against the torch that it will run with"):
            run(place.without_torch, "setup.py", *arguments, cwd=place.sources)


def test_install_from_sdist(place, sdist):
    """The sdist contains every header."""
    (place.folder / "preprocess").touch()
    try:
        place.pip("install", "--no-build-isolation", "--no-deps", "--no-cache-dir", sdist)
    finally:
        (place.folder / "preprocess").unlink()
    assert place.compiled() == len([name for name in place.files if re.match(r"csrc/(?!.*\bcuda/).*\.cpp", name)])
    check_installed(place, LOCAL, site(place))


def test_install_from_index(place, sdist):
    """The version must match the file's name: pip rejects it otherwise."""
    options = ["--no-build-isolation", "--no-deps", "--no-cache-dir", "--force-reinstall"]
    place.pip("install", *options, "--find-links", sdist.parent, "torch-blockdiag")
    check_installed(place, VERSION, site(place))


def test_wheel(place, tmp_path):
    """Its name includes the torch version, and it contains only the package."""
    place.pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, ".")
    (wheel,) = tmp_path.iterdir()
    assert wheel.name.startswith(f"torch_blockdiag-{LOCAL}-cp")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"torch_blockdiag-{LOCAL}.dist-info/METADATA").decode()
    assert f"\nRequires-Dist: torch=={RELEASE}.*\n" in metadata
    assert {name.split("/")[0] for name in names} == {"blockdiag", f"torch_blockdiag-{LOCAL}.dist-info"}
    assert {"blockdiag/py.typed", compiled_module().name.join(["blockdiag/", ""])} <= set(names)
    place.pip("install", "--no-deps", "--force-reinstall", wheel)
    check_installed(place, LOCAL, site(place))


def test_editable(place):
    place.pip("install", "--no-build-isolation", "--no-deps", "--force-reinstall", "--editable", ".")
    check_installed(place, LOCAL, place.sources)


def build(place, *command: str, **environment: str) -> int:
    """Runs setup.py. Returns the number of objects compiled."""
    place.compiled()
    place.run(place.python, "setup.py", *command, cwd=place.sources, **environment)
    return place.compiled()


def test_what_makes_objects_stale(place):
    """In one build folder: another torch in the same place, another compiler, other environment variables."""
    build(place, "bdist_wheel")
    assert build(place, "bdist_wheel") == 0
    place.replace_torch(torch.__version__, f"{RELEASE}.99+other")
    assert build(place, "bdist_wheel") > 5
    place.replace_torch(f"{RELEASE}.99+other", torch.__version__)
    (place.folder / "version").write_text("2.0")
    assert build(place, "bdist_wheel") > 5
    assert build(place, "bdist_wheel", CPATH="/elsewhere") > 5


def test_module_in_place_is_stale_too(place):
    inplace = ["build_ext", "--inplace"]
    build(place, *inplace)
    place.replace_torch(torch.__version__, f"{RELEASE}.99+other")
    assert build(place, *inplace) > 5
    assert build(place, *inplace) == 0
    place.replace_torch(f"{RELEASE}.99+other", torch.__version__)


def test_without_ninja(place, tmp_path):
    """setuptools alone would compare the sources' dates, and keep the old module."""
    for program in Path("/usr/bin").iterdir():
        if program.name != "ninja":
            (tmp_path / program.name).symlink_to(program)
    for _ in range(2):
        assert build(place, "build_ext", PATH=str(tmp_path)) > 5


def test_make_builds_again(place):
    """For another torch, or other variables, but not without changes."""

    def make(**environment):
        place.compiled()
        venv = place.python.parent.parent
        place.run("make", venv / "built", cwd=place.sources, VENV=str(venv), **environment)
        return place.compiled()

    make_env = place.sources / "scripts/create_env.sh"
    make_env.write_text("#!/bin/sh\necho made by $TORCH >>env-made\n")  # the real one needs a network
    make_env.chmod(make_env.stat().st_mode | stat.S_IXUSR)
    made = place.sources / "env-made"
    make()
    assert made.read_text() == "made by\n"
    assert make() == 0
    place.replace_torch(torch.__version__, f"{RELEASE}.99")
    assert make() > 5
    assert make() == 0
    place.replace_torch(f"{RELEASE}.99", torch.__version__)
    assert make(CPATH="/elsewhere") > 5
    assert made.read_text() == "made by\n"
    make(TORCH=f"torch=={torch.__version__}", CPATH="/elsewhere")
    make(TORCH=f"torch=={torch.__version__}", CPATH="/elsewhere")
    assert made.read_text() == f"made by\nmade by torch=={torch.__version__}\n"


def configure(place, folder: Path, torch_folder: Path, *options: str) -> str:
    """The commands that ninja would run after CMake's configuration."""
    bin = Path(sys.executable).parent
    options = (*options, f"-DCMAKE_PREFIX_PATH={torch_folder}/share/cmake", f"-DCMAKE_MAKE_PROGRAM={bin}/ninja")
    run(bin / "cmake", "-S", place.sources, "-B", folder, "-G", "Ninja", "-DBUILD_TESTING=OFF", *options)
    return (folder / "build.ninja").read_text()


def test_cmake_builds_again(place, tmp_path):
    """In one build folder: for another torch in the same place, and for one elsewhere."""

    def fingerprint(text):
        (found,) = set(re.findall(r"-DBLOCKDIAG_FINGERPRINT=(\w+)", text))
        return found

    before = configure(place, tmp_path, place.torch)
    assert fingerprint(before) == fingerprint(configure(place, tmp_path, place.torch))
    place.replace_torch(torch.__version__, f"{RELEASE}.99+other")
    after = configure(place, tmp_path, place.torch)
    place.replace_torch(f"{RELEASE}.99+other", torch.__version__)
    assert fingerprint(before) != fingerprint(after)
    elsewhere = Path(torch.__file__).parent
    assert f"{place.torch}/lib/libc10.so" in after
    assert f"{elsewhere}/lib/libc10.so" not in after
    moved = configure(place, tmp_path, elsewhere)
    assert f"{place.torch}/" not in moved
    assert f"{elsewhere}/lib/libc10.so" in moved


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_cmake_with_nvcc_of_another_major_version(place, tmp_path):
    text = (place.torch / "version.py").read_text()
    (place.torch / "version.py").write_text(re.sub("(?m)^cuda.*$", "cuda = '99.1'", text))
    try:
        with pytest.raises(AssertionError, match=r"torch has CUDA 99\.1, but nvcc in .* is\s+of\s+CUDA"):
            configure(place, tmp_path, place.torch, "-DBLOCKDIAG_CUDA=ON")
    finally:
        (place.torch / "version.py").write_text(text)
