"""A folder while it is written: whatever ends the writing, and whenever, nothing is left of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from ditforge import unfinished_folder


def test_an_interrupt_at_any_line_leaves_nothing(tmp_path: Path) -> None:
    """A signal's exception comes between any two lines, the making of the folder and its use included."""
    number, interrupted = 0, True
    while interrupted:
        interrupted = interrupted_at(number, tmp_path / "onnx")
        assert os.listdir(tmp_path) == []
        number += 1
    assert number > 5


def interrupted_at(number: int, target: Path) -> bool:
    """Write a folder, interrupted before line `number` of unfinished_folder.py; False if it has fewer lines."""
    passed = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal passed
        if frame.f_code.co_filename != unfinished_folder.__file__ or frame.f_lineno >= finishing:
            return None
        if event == "line":
            passed += 1
            if passed > number:
                raise KeyboardInterrupt
        return trace

    finishing = line_of("    finally:")
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with unfinished_folder.partial_folder(target) as folder:
            (folder / "file").write_text("x")
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def line_of(text: str) -> int:
    """The first line of unfinished_folder.py that is `text`."""
    return Path(unfinished_folder.__file__).read_text().splitlines().index(text) + 1


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    abandoned = tmp_path / f".onnx.0123{unfinished_folder.SUFFIX}"
    abandoned.mkdir()
    write = unfinished_folder.partial_folder
    with write(tmp_path / "onnx") as first, write(tmp_path / "onnx") as second:
        assert not abandoned.exists()
        assert first.is_dir() and second.is_dir()
    assert os.listdir(tmp_path) == []
