"""Digests of files: a large file is read once, and again whenever it may have changed."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from ditforge import digests
from ditforge.digests import sha256_of


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(digests, "LARGE", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ditforge" / "digests"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    seen: list[Path] = []
    original = digests.read
    monkeypatch.setattr(digests, "read", lambda path: (seen.append(path), original(path))[1])
    return seen


def written(path: Path, content: bytes, age: float = 10) -> Path:
    path.write_bytes(content)
    os.utime(path, (time.time() - age,) * 2)
    return path


def expected(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_large_file_is_read_once_also_by_another_name(tmp_path: Path, reads: list[Path]) -> None:
    file = written(tmp_path / "weights", bytes(20))
    assert [sha256_of(file), sha256_of(file)] == [expected(bytes(20))] * 2
    os.link(file, tmp_path / "linked")
    assert sha256_of(tmp_path / "linked") == expected(bytes(20))
    assert reads == [file]


def test_a_file_is_read_again_when_it_has_changed(tmp_path: Path) -> None:
    file = written(tmp_path / "weights", bytes(20))
    sha256_of(file)
    with file.open("r+b") as stream:
        stream.write(b"x")
    assert sha256_of(file) == expected(b"x" + bytes(19))
    file.unlink()
    written(file, b"y" * 20)  # another file, which may have got the same inode
    assert sha256_of(file) == expected(b"y" * 20)


def test_a_file_that_was_just_written_is_read_a_moment_later(tmp_path: Path, cache: Path, reads: list[Path]) -> None:
    """Whoever writes again within a tick of the kernel's clock leaves the same time."""
    file = written(tmp_path / "weights", bytes(20), age=0)
    sha256_of(file)
    assert time.time_ns() - file.stat().st_mtime_ns >= digests.TICK
    assert len(list(cache.iterdir())) == 1


def test_a_file_of_the_future_is_not_taken_as_known(tmp_path: Path, cache: Path) -> None:
    sha256_of(written(tmp_path / "weights", bytes(20), age=-1000))
    assert not cache.exists()


def test_a_file_is_read_anew_when_asked(tmp_path: Path, reads: list[Path]) -> None:
    file = written(tmp_path / "weights", bytes(20))
    before = file.stat()
    sha256_of(file)
    with file.open("r+b") as stream:
        stream.write(b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk changes it
    assert sha256_of(file) == expected(bytes(20))
    assert sha256_of(file, anew=True) == expected(b"x" + bytes(19))
    assert sha256_of(file) == expected(b"x" + bytes(19))
    assert len(reads) == 2


def test_small_files_and_a_cache_that_cannot_be_written(tmp_path: Path, cache: Path, reads: list[Path]) -> None:
    small = written(tmp_path / "small", bytes(9))
    assert [sha256_of(small), sha256_of(small)] == [expected(bytes(9))] * 2
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"")  # where its folder would be
    large = written(tmp_path / "large", bytes(20))
    assert [sha256_of(large), sha256_of(large)] == [expected(bytes(20))] * 2
    assert len(reads) == 4


@pytest.mark.parametrize("content", [b"", b"20 1 abc", b"\xff\xfe", b"20 17 " + b"0" * 64])
def test_what_is_damaged_in_the_cache_counts_for_nothing(tmp_path: Path, cache: Path, content: bytes) -> None:
    file = written(tmp_path / "weights", bytes(20))
    sha256_of(file)
    (kept,) = cache.iterdir()
    kept.write_bytes(content)
    assert sha256_of(file) == expected(bytes(20))


def test_the_oldest_are_forgotten(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MOST", 3)
    for number in range(5):
        sha256_of(written(tmp_path / f"{number}", bytes(20)))
    assert len(list(cache.iterdir())) == 3
