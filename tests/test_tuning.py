"""The choice of the GPU library, and the file of measured choices."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

import blockdiag
from blockdiag._load import extension
from conftest import require_cuda_build

DEVICE = "A GPU that nobody has"


def choice(**changed: int) -> dict:
    problem = {name: 1 for name in extension.PROBLEM_FIELDS if name != "device"} | changed
    return {"problem": problem, "algorithm": "0123456789abcdef" * 8}


def environment(choices: list, **changed: object) -> dict:
    versions = {"torch": str(torch.__version__), "cublaslt": extension.cublaslt_version()}
    return {"device": DEVICE, **versions, **changed, "choices": choices}


def content(*environments: dict) -> dict:
    return {"format": "blockdiag tuning", "version": 3, "environments": list(environments)}


@pytest.fixture
def cublaslt():
    require_cuda_build()
    before = blockdiag.backends.cuda.preferred_blas_library()
    blockdiag.backends.cuda.preferred_blas_library("cublaslt")
    yield
    blockdiag.backends.cuda.preferred_blas_library(before)


def while_tuning(path, action) -> None:
    with blockdiag.backends.tune(path):
        action()


def add(m: int) -> None:
    extension.add_choice(DEVICE, numbers_of(choice(m=m)), [1] * 8)


def numbers_of(entry: dict) -> list[int]:
    return [entry["problem"].get(name, 0) for name in extension.PROBLEM_FIELDS]


def choices() -> list:
    return [(numbers, words) for device, numbers, words in extension.choices() if device == DEVICE]


class TestPreferredLibrary:
    def test_is_set_and_returned(self):
        require_cuda_build()
        before = blockdiag.backends.cuda.preferred_blas_library()
        try:
            assert blockdiag.backends.cuda.preferred_blas_library("cublaslt") == "cublaslt"
            assert blockdiag.build_info()["cuda_gemm"] == blockdiag.backends.cuda.preferred_blas_library() == "cublaslt"
            with pytest.raises(
                ValueError, match=r'to be one of \[cublas, cublaslt, fused, small_blocks\], but got "fast"'
            ):
                blockdiag.backends.cuda.preferred_blas_library("fast")
            assert blockdiag.backends.cuda.preferred_blas_library() == "cublaslt"
        finally:
            blockdiag.backends.cuda.preferred_blas_library(before)

    def test_without_cuda(self):
        if blockdiag.build_info()["cuda"] != "none":
            pytest.skip("this build has CUDA")
        with pytest.raises(RuntimeError, match="expected a build of blockdiag with CUDA"):
            blockdiag.backends.cuda.preferred_blas_library()
        with blockdiag.backends.tune():  # a program that tunes runs on every build
            pass


class TestFile:
    def test_choices_are_taken_over_and_kept(self, cublaslt, tmp_path):
        path = tmp_path / "tuning.json"
        entries = [choice(m=101), choice(m=102, epilogue=2)]
        path.write_text(json.dumps(content(environment(entries))))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with blockdiag.backends.tune(path):
                taken = choices()
        assert [numbers_of(entry) for entry in entries] == [numbers for numbers, _ in taken if numbers[0] in (101, 102)]
        assert taken[-1][1] == [0xEFCDAB8967452301] * 8
        written = path.stat().st_ino  # a new file takes its place
        with blockdiag.backends.tune(path):
            pass
        assert path.stat().st_ino == written, "there was nothing new to write"

    def test_what_is_new_is_added(self, cublaslt, tmp_path):
        """To the choices that other environments and other processes wrote, even meanwhile."""
        path = tmp_path / "tuning.json"
        foreign = environment([choice()], torch="1.0")
        other_device = environment([choice(m=201)], device="Another")
        mine = environment([choice(m=202)])
        path.write_text(json.dumps(content(foreign, other_device, mine)))
        with blockdiag.backends.tune(path):
            extension.add_choice(DEVICE, numbers_of(choice(m=203)), [7, 0, 0, 0, 0, 0, 0, 0])
            written_meanwhile = environment([choice(m=204)])
            path.write_text(json.dumps(content(foreign, other_device, mine, written_meanwhile)))
        environments = json.loads(path.read_text())["environments"]
        assert foreign in environments
        by_device = {e["device"]: e["choices"] for e in environments if e["torch"] == str(torch.__version__)}
        sizes = {entry["problem"]["m"]: entry["algorithm"] for entry in by_device[DEVICE]}
        assert sizes.keys() >= {202, 203, 204}
        assert sizes[203] == "07" + "00" * 63
        assert other_device["choices"][0] in by_device["Another"]
        assert list(tmp_path.iterdir()) == [path]
        with blockdiag.backends.tune(path):  # it reads what it wrote
            pass

    def test_a_first_file(self, cublaslt, tmp_path):
        path = tmp_path / "tuning.json"
        while_tuning(path, lambda: add(301))
        assert json.loads(path.read_text())["format"] == "blockdiag tuning"

    def test_measured_choices_outlive_an_error(self, cublaslt, tmp_path):
        path = tmp_path / "tuning.json"

        def fail():
            add(401)
            raise KeyError("user")

        with pytest.raises(KeyError, match="user"):
            while_tuning(path, fail)
        assert path.exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "it is not JSON"),
            ('{"format": "blockdiag tu', "it is not JSON"),
            ("[]", "expected it to say"),
            ("[" * 100000, "it is not JSON"),
            ('{"format": "blockdiag tuning", "version": 2, "environments": []}', "expected it to say"),
            (lambda: content() | {"environments": {}}, "a list of environments"),
            (lambda: content({"device": DEVICE}), "expected an object of"),
            (lambda: content(environment([choice() | {"algorithm": "12"}])), "128 hexadecimal digits"),
            (lambda: content(environment([choice() | {"algorithm": "z" * 128}])), "128 hexadecimal digits"),
            (lambda: content(environment([choice(m=2**63)])), "numbers of 64 bits"),
            (lambda: content(environment([choice(m=1.5)])), "expected an object of"),
            (lambda: content(environment([{"problem": {}, "algorithm": ""}])), "expected an object of"),
        ],
    )
    def test_a_damaged_file_is_reported_and_left_alone(self, cublaslt, tmp_path, text, message):
        path = tmp_path / "tuning.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text()))
        before, known = path.read_text(), len(extension.choices())

        def check_and_add():
            assert len(extension.choices()) == known
            add(1000 + known)

        with pytest.warns(UserWarning, match=f"is ignored, and left as it is: .*{message}") as caught:
            while_tuning(path, check_and_add)
        assert caught[0].filename == __file__
        assert path.read_text() == before
        assert len(extension.choices()) == known + 1

    def test_a_file_that_cannot_be_written_does_not_end_the_program(self, cublaslt, tmp_path):
        """The folder is gone; the user's exception is not replaced."""
        folder = tmp_path / "folder"
        folder.mkdir()

        def remove():
            add(601)
            folder.rmdir()
            raise KeyError("user")

        with pytest.raises(KeyError, match="user"), pytest.warns(UserWarning, match="is left as it is: .*No such file"):
            while_tuning(folder / "tuning.json", remove)

    def test_permissions_and_links_stay(self, cublaslt, tmp_path):
        path, link = tmp_path / "tuning.json", tmp_path / "link.json"
        link.symlink_to(path)
        while_tuning(link, lambda: add(701))
        path.chmod(0o640)
        while_tuning(link, lambda: add(702))
        assert link.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o640
        assert {701, 702} <= {c["problem"]["m"] for c in json.loads(path.read_text())["environments"][0]["choices"]}

    def test_processes_that_end_together_lose_nothing(self, cublaslt, tmp_path):
        path = tmp_path / "tuning.json"
        code = """
import sys
from blockdiag._load import extension
numbers = [1] * len(extension.PROBLEM_FIELDS)
for number in range(50):
    numbers[0] = 50 * int(sys.argv[1]) + number
    extension.add_choice("device", numbers, [1] * 8)
import blockdiag.backends.tuning
from pathlib import Path
input()
blockdiag.backends.tuning._add_to(Path(sys.argv[2]))
"""
        commands = [[sys.executable, "-c", code, str(index), str(path)] for index in range(4)]
        processes = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for command in commands]
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        for process in processes:
            process.communicate(timeout=300)
        choices = json.loads(path.read_text())["environments"][0]["choices"]
        assert {choice["problem"]["m"] for choice in choices} == set(range(200))
        assert list(tmp_path.iterdir()) == [path]

    def test_a_binary_file(self, cublaslt, tmp_path):
        path = tmp_path / "model.pt"
        path.write_bytes(b"\xff\xfe\x00PK")
        with pytest.warns(UserWarning, match="it is not text"), blockdiag.backends.tune(path):
            pass

    @pytest.mark.parametrize("changed", [{"torch": "1.0"}, {"cublaslt": 1}])
    def test_a_foreign_file_is_reported_and_not_used(self, cublaslt, tmp_path, changed):
        path = tmp_path / "tuning.json"
        path.write_text(json.dumps(content(environment([choice(m=501)], **changed))))
        with (
            pytest.warns(UserWarning, match="has nothing for .*it was made for") as caught,
            blockdiag.backends.tune(path),
        ):
            assert 501 not in [numbers[0] for numbers, _ in choices()]
        assert caught[0].filename == __file__

    def test_a_build_without_cuda_says_so(self, tmp_path):
        if blockdiag.build_info()["cuda"] != "none":
            pytest.skip("this build has CUDA")
        for path in (None, tmp_path / "tuning.json"):
            with pytest.warns(
                UserWarning, match=r"blockdiag.backends.tune: there is nothing to tune.*built without CUDA"
            ) as seen:
                while_tuning(path, lambda: None)
            assert seen[0].filename == __file__
        environment = {**os.environ, "BLOCKDIAG_TUNE": str(tmp_path / "tuning.json")}
        command = [sys.executable, "-c", "import blockdiag"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert result.stderr.count("there is nothing to tune") == 1

    def test_a_missing_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a file in an existing folder"):
            while_tuning(tmp_path / "missing" / "tuning.json", lambda: None)


class TestEnvironmentVariable:
    def run(self, path, gemm):
        code = """
import blockdiag
from blockdiag._load import extension
assert blockdiag.backends.cuda.preferred_blas_library()
fields = extension.PROBLEM_FIELDS
print(len(extension.choices()))
extension.add_choice("device", [11] * len(fields), [1] * 8)
"""
        variables = {"BLOCKDIAG_TUNE": str(path), "BLOCKDIAG_CUDA_GEMM": gemm}
        command = [sys.executable, "-c", code]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    def test_reads_and_writes(self, tmp_path):
        require_cuda_build()
        path = tmp_path / "tuning.json"
        assert [self.run(path, "cublaslt").stdout.strip() for _ in range(2)] == ["0", "1"]

    def test_says_where_it_does_nothing(self, tmp_path):
        require_cuda_build()
        assert "BLOCKDIAG_TUNE=" in self.run(tmp_path / "missing" / "tuning.json", "cublaslt").stderr
        assert "only cuBLASLt has algorithms to choose from" in self.run(tmp_path / "tuning.json", "cublas").stderr
