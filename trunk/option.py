"""How an option is written: errors speak of Python's parameters in Python, and of flags on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def as_flags() -> Iterator[None]:
    """While this lasts, options are written as flags, in all threads."""
    global _flags
    before, _flags = _flags, True
    try:
        yield
    finally:
        _flags = before
