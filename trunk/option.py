"""How errors write an option: as a parameter in Python, and as a flag on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

from ditforge.errors import UserError

_flags = False


class Option(str):
    """An option in Python's form, which is written as its flag on the command line.

    The form is chosen when the option is formatted, not when it is made.
    """

    flag: str

    def __str__(self) -> str:
        return self.flag if _flags else str.__str__(self)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __add__(self, other: str) -> str:
        return str(self) + other


def option(python: str, flag: str = "") -> str:
    """Make an option as errors write it.

    `python` is NAME=VALUE, or only NAME, as a public function takes it. `flag` is the same option on the command line,
    by default --NAME VALUE.
    """
    name, _, value = python.partition("=")
    dashed = name.replace("_", "-")
    made = Option(python)
    made.flag = flag or f"--{dashed} {value}".rstrip()
    return made


def setting(name: str, value: object) -> str:
    """Make an option with a value, as errors write it: `precision="fp8"` in Python, and `--precision fp8` as a flag."""
    if value is True:
        return option(f"{name}=True", f"--{name.replace('_', '-')}")
    return option(f"{name}={json.dumps(value, ensure_ascii=False)}", f"--{name.replace('_', '-')} {value}")


def check_names(names: Iterable[str], known: Iterable[str], meant: Mapping[str, str] | None = None) -> None:
    """Raise UserError if one of the names is not a known option of a public function. It suggests the nearest name.

    `meant` maps names that other software uses to the names of the same options here.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = [meant[name]] if meant and name in meant else get_close_matches(name, known, n=1)
            better = f"{near[0]}=…" if near else "leave it out"
            raise UserError(f"there is no option {name!r}", f"{better}; the options are {', '.join(known)}")


def are_flags() -> bool:
    """Whether options are written as flags now."""
    return _flags


@contextmanager
def as_flags(wanted: bool = True) -> Iterator[None]:
    """Write options as flags, in all threads, until the block ends. If `wanted` is false, write them as in Python."""
    global _flags
    before, _flags = _flags, wanted
    try:
        yield
    finally:
        _flags = before
