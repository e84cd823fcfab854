"""Files that users name: what has no end, or is something else than a file, is refused at once, and left alone."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest
from command_line import assert_error, ditforge

from ditforge.errors import UserError
from ditforge.small_files import check_writable, read_bytes, read_lines


def test_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1234")
    os.mkfifo(tmp_path / "pipe")
    assert read_bytes(tmp_path / "file", largest=4) == b"1234"
    for path, words in {
        tmp_path / "file": "more than 3 bytes",
        tmp_path / "pipe": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        tmp_path: "Is a directory",
        tmp_path / "none": "No such file",
    }.items():
        with pytest.raises(OSError, match=words):
            read_bytes(path, largest=3)


def test_lines_that_a_person_wrote(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufeffone\r\n\r\n # none\r\n two\x0bthree\u2028\t4\n\x1c5 # 5".encode())
    lines = read_lines(tmp_path / "a", "prompts", "")
    assert lines == [(1, "one"), (4, " two\x0bthree\u2028\t4"), (5, "\x1c5 # 5")]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"# a\n\n", "there are no prompts in"), (b"\xff", "not UTF-8 text"), ("a".encode("utf-16-le"), "null bytes")],
)
def test_lines_that_cannot_be_read(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=f"{words}(?s:.*)fix:   do so"):
        read_lines(tmp_path / "a", "prompts", "do so")


def test_what_is_written(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "file", "example")
    assert os.listdir(tmp_path / "new" / "folder") == []
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path, words in {
        tmp_path: "is a folder",
        tmp_path / "pipe": "is not a regular file",
        Path("/dev/null"): "is not a regular file",
        tmp_path / "file" / "file": f"{tmp_path}/file is a file",
        tmp_path / "file" / "below" / "file": f"{tmp_path}/file is a file",
        Path("/proc/file"): "cannot write",
    }.items():
        with pytest.raises(UserError, match=words):
            check_writable(path, "example")


@pytest.mark.parametrize("kind", ["folder", "pipe"])
@pytest.mark.parametrize("command", ["calibrate", "generate"])
def test_a_target_that_is_no_file_is_left_alone(command: str, kind: str, schnell, tmp_path: Path) -> None:
    """Found out before anything is run. A device would have been replaced by a file, and a folder lost the result."""
    out = tmp_path / "out.png"
    out.mkdir() if kind == "folder" else os.mkfifo(out)
    before, what = out.stat(), schnell.checkpoint if command == "calibrate" else "a red circle"
    result = ditforge(command, what, "--out", out, cwd=tmp_path)
    assert_error(result, "is a folder" if kind == "folder" else "is not a regular file", "--out")
    assert (out.stat().st_ino, stat.S_IFMT(out.stat().st_mode)) == (before.st_ino, stat.S_IFMT(before.st_mode))


@pytest.mark.parametrize(
    "arguments",
    [
        ("serve", "REPO", "--port", "0", "--token-file", "/dev/zero"),
        ("serve", "REPO", "--port", "0", "--token-file", "pipe"),
        ("generate", "a", "--token-file", "/dev/zero"),
        ("generate", "a", "--tls-ca", "pipe"),
        ("calibrate", "CHECKPOINT", "--prompts", "/dev/zero", "--out", "ranges.json"),
        ("export", "CHECKPOINT", "--precision", "fp8", "--calibration", "/dev/zero", "--out", "onnx"),
    ],
)
def test_a_file_without_an_end(arguments: tuple[str, ...], schnell, tmp_path: Path) -> None:
    """A gigabyte a second, until the machine had no memory left; or a pipe that nobody writes into."""
    os.mkfifo(tmp_path / "pipe")
    named = {"REPO": schnell.repository, "CHECKPOINT": schnell.checkpoint}
    begun = time.monotonic()
    result = ditforge(*(named.get(argument, argument) for argument in arguments), cwd=tmp_path)
    assert_error(result, "it is not a regular file")
    assert time.monotonic() - begun < 60
