"""How an option is written: errors speak of Python's parameters in Python, and of flags on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches

from ditforge.errors import UserError

_flags = False


class Option(str):
    """An option as Python has it, which reads as its flag on the command line: when it is formatted, not when made."""

    flag: str

    def __str__(self) -> str:
        return self.flag if _flags else str.__str__(self)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __add__(self, other: str) -> str:
        return str(self) + other


def option(python: str, flag: str = "") -> str:
    """An option as errors write it. `python` is NAME=VALUE, or NAME, as a public function takes it; `flag` is the same
    on the command line, by default of that name.
    """
    name, _, value = python.partition("=")
    dashed = name.replace("_", "-")
    made = Option(python)
    made.flag = flag or f"--{dashed} {value}".rstrip()
    return made


def setting(name: str, value: object) -> str:
    """An option with a value, as errors write it: `precision="fp8"` in Python, `--precision fp8` as flags."""
    if value is True:
        return option(f"{name}=True", f"--{name.replace('_', '-')}")
    return option(f"{name}={json.dumps(value, ensure_ascii=False)}", f"--{name.replace('_', '-')} {value}")


def check_names(names: Iterable[str], known: Iterable[str], meant: Mapping[str, str] | None = None) -> None:
    """Raise UserError, with the nearest name, if one of the names is none of the known options of a public function.

    `meant` gives the option's name here for names that other software has.
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
    """While this lasts, options are written as flags, in all threads; for False, as Python has them."""
    global _flags
    before, _flags = _flags, wanted
    try:
        yield
    finally:
        _flags = before
