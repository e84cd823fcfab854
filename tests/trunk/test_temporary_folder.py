"""The folder for temporary files where it is missing, cannot be written, or is full."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

import pytest
from command_line import COMMAND, assert_error, ditforge
from small_disk import in_tmpfs

from ditforge import temporary_folder
from ditforge.errors import UserError


@pytest.fixture(autouse=True)
def unnamed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in temporary_folder.NAMES:
        monkeypatch.delenv(name, raising=False)


def test_it_is_the_one_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert temporary_folder.check() == Path(tempfile.gettempdir())
    monkeypatch.setenv("TMP", str(tmp_path))
    assert temporary_folder.check() == tmp_path
    with temporary_folder.temporary_folder() as made:
        assert made.parent == tmp_path and made.is_dir()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("name", "reason"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_one_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    """Python's tempfile would take /tmp without a word, and native code would fail later."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / name))
    with pytest.raises(UserError) as error, temporary_folder.temporary_folder():
        pass
    there = tmp_path / name
    assert error.value.problem == f"no temporary files can be written in {there}, which TMPDIR names: {reason}"
    assert error.value.fix == "TMPDIR=FOLDER   before the command, with one that can be written; or unset TMPDIR"


def test_a_system_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/no/tmp"])
    with pytest.raises(UserError, match=re.escape("there is no folder for temporary files: No usable")) as error:
        temporary_folder.check()
    assert error.value.fix == "TMPDIR=FOLDER   before the command, with one that can be written"


PROGRAM = """
import sys
from ditforge import temporary_folder
from ditforge.errors import UserError
try:
    with temporary_folder.temporary_folder() as folder, temporary_folder.filled(folder):
        (folder / "large").write_bytes(bytes(100_000))
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("options", "problem", "fix"),
    [
        ("size=16k", "there is no space left for temporary files in {}", "free some space, or TMPDIR=FOLDER"),
        ("size=4k,nr_inodes=1", "can be written in {}, which TMPDIR names: No space left", "free some space, or"),
        ("size=16k,ro", "can be written in {}, which TMPDIR names: Read-only file system", "TMPDIR=FOLDER"),
        ("size=1m", "", ""),
    ],
)
def test_one_without_room(tmp_path: Path, options: str, problem: str, fix: str) -> None:
    done = in_tmpfs(tmp_path, options, sys.executable, "-c", PROGRAM, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    said, _, advice = done.out.partition("fix:   ")
    assert problem.format(tmp_path) in said and advice.startswith(fix)
    assert bool(done.out) == bool(problem)


def test_an_error_of_another_kind_stays_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a fault of ours"), temporary_folder.filled(tmp_path):
        raise ValueError("a fault of ours")


EXPORT = ("export", "flux.1-dev", "--random-weights", "--out", "onnx")


def test_a_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert_error(ditforge(*EXPORT, cwd=tmp_path), "which TMPDIR names: No such file or directory", "TMPDIR=FOLDER")
    assert os.listdir(tmp_path) == []


def test_a_command_says_that_it_is_full(tmp_path: Path) -> None:
    done = in_tmpfs(tmp_path, "size=64k", *COMMAND, *EXPORT, cwd=tmp_path)
    assert_error(done, f"no space left for temporary files in {tmp_path}", "free some space")
    assert os.listdir(tmp_path) == []
