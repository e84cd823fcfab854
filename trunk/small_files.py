"""Reads and writes the small files that users name.

Reading has a limit of bytes, and whether a file can be written is checked before other work begins.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from ditforge import write_errors
from ditforge.errors import UserError
from ditforge.option import option, setting

LARGEST = 64 << 20  # bytes; the largest such files, indices of checkpoints and vocabularies, have a few MB


def read_bytes(path: str | PathLike[str], largest: int = LARGEST) -> bytes:
    """The content of a file.

    Raises OSError if it cannot be read, has more than `largest` bytes, or is not a regular file: a device or a pipe may
    have no end, or let a reader wait for ever.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # for a folder, open() raises the right error
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise OSError(errno.EFBIG, f"it has more than {largest:,} bytes", str(path))
    return content


def read_lines(path: Path, what: str, fix: str) -> list[tuple[int, str]]:
    """The lines of a file that a person wrote, in UTF-8, with their numbers, from 1 on.

    Empty lines, and comments, which begin with #, are left out. Raises UserError with the advice `fix` if the file
    cannot be read, is not UTF-8 or has no line; `what` is what it should have, such as "prompts".
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")  # without the mark that Windows' editors put at the beginning
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror}", fix) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason}", fix) from None
    if "\0" in text:
        raise UserError(f"{path} is not UTF-8 text: there are null bytes in it", fix)
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)]
    lines = [(number, line) for number, line in numbered if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UserError(f"there are no {what} in {path}", fix)
    return lines


def read_json_object(path: Path, whole: str = "") -> dict[str, Any]:
    """Read the JSON object in a file. Raises UserError if the file is missing, or holds something else.

    `whole` names what the file is a part of, for the errors, such as "checkpoint".
    """
    fix = f"copy {path.name} again from where {f'the {whole}' if whole else 'it'} came from"
    try:
        content = json.loads(read_bytes(path))
    except OSError as error:
        lacks = f"the {whole} lacks {path} ({error.strerror})"
        raise UserError(lacks if whole else f"cannot read {path}: {error.strerror}", fix) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}", fix) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a JSON object", fix)
    return content


class KeyTwice(ValueError):
    """An object of JSON has a key twice."""


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON that a person wrote; json.loads calls it as its `object_pairs_hook`.

    Raises KeyTwice for a key that is there twice, of which json.loads would take the last without a word.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyTwice(f"{json.dumps(next(name for name in names if names.count(name) > 1))} is there twice")
    return content


@contextmanager
def written_whole(path: Path, name: str = "out") -> Iterator[Path]:
    """Yield the path of a temporary file beside `path`, for the block to write.

    When the block ends, the file takes the place of `path`; if the block fails, it is removed. Raises UserError if it
    cannot be written. `name` is the option that gives the path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        fix = write_errors.fix(error, str(another(name)))
        raise UserError(f"cannot write {path}: {write_errors.reason(error)}", fix) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path, example: str, name: str = "out") -> None:
    """Make the folder for a file that will be written, and check that it can be. `example` is a name for the file.

    Raises UserError if it cannot be written, or if `path` is not a regular file, which is then left as it is. `name` is
    the option that gives the path.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder", setting(name, str(path / example)))
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a regular file", another(name))
        there = next(parent for parent in path.absolute().parents if parent.exists())
        if not there.is_dir():
            raise UserError(f"cannot write {path}: {there} is a file", another(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}", another(name)) from error


def another(name: str) -> str:
    """The advice to give another file with the option of that name."""
    return f"choose another {option(name)}"
