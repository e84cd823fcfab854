"""How errors write an option: as a parameter in Python, as a flag on the command line, and as a key in a file."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from difflib import get_close_matches
from shlex import quote
from types import MappingProxyType

from ditforge.errors import UserError

_flags = False


@dataclass
class Keys:
    """The names of the options that a file gives as JSON, those of them that were written, and who can change them."""

    names: Collection[str]
    replaceable: bool
    written: set[str] = field(default_factory=set)


_renamed: ContextVar[Mapping[str, str]] = ContextVar("ditforge.option.renamed", default=MappingProxyType({}))
_keys: ContextVar[Keys | None] = ContextVar("ditforge.option.keys", default=None)


class Option(str):
    """An option in Python's form, which is written as its flag on the command line, and as its key for a file.

    The form is chosen when the option is formatted, not when it is made.
    """

    flag: str

    def __str__(self) -> str:
        name, _, value = str.__str__(self).partition("=")
        keys = _keys.get()
        if keys is not None and name in keys.names:
            keys.written.add(name)
            if not value:
                return json.dumps(name)
            if not keys.replaceable:
                return f"{json.dumps(name)}: {value}"
        return own_flags(self.flag) if _flags else str.__str__(self)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __add__(self, other: str) -> str:
        return str(self) + other


def own_flags(text: str) -> str:
    """A text with flags as the command calls them that runs others."""
    for name, own in _renamed.get().items():
        text = re.sub(rf"(?<![\w-]){name}(?![\w-])", own, text)
    return text


@contextmanager
def renamed(flags: Mapping[str, str]) -> Iterator[None]:
    """Write flags under other names until the block ends, by which a command has the options of others that it runs."""
    token = _renamed.set(flags)
    try:
        yield
    finally:
        _renamed.reset(token)


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
    """Make an option with a value, as errors write it: `precision="fp8"` in Python, and `--precision fp8` as a flag.

    The flag's value is quoted for a shell where it has to be.
    """
    if value is True:
        return option(f"{name}=True", f"--{name.replace('_', '-')}")
    dashed = name.replace("_", "-")
    return option(f"{name}={json.dumps(value, ensure_ascii=False)}", f"--{dashed} {quote(str(value))}")


def command(form: str, *values: object) -> str:
    """Write a command as a shell takes it: `command("ditforge build {} --gpu {}", folder, "cpu")`.

    The values take the places in `form`, in quotation marks where a shell needs them.
    """
    return form.format(*(quote(str(value)) for value in values))


def check_names(names: Iterable[str], known: Iterable[str], meant: Mapping[str, str] | None = None) -> None:
    """Raise UserError if one of the names is not a known option of a public function. It suggests the nearest name.

    `meant` maps names that other software uses to the names of the same options here.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = [meant[name]] if meant and name in meant else get_close_matches(name, known, n=1)
            better = option(f"{near[0]}=…") if near else "leave it out"
            raise UserError(f"there is no option {name!r}", f"{better}; the options are {', '.join(known)}")


@contextmanager
def as_keys(names: Collection[str], replaceable: bool = False) -> Iterator[set[str]]:
    """Write the options with these names, which a file gives, as its JSON keys: `"size": "16:9"`, until the block ends.

    If `replaceable`, others replace those in the file, and an option with a value, which is advice, is one of them.
    Yields the set of the names that have been written so, which tells whether an error is about the file.
    """
    keys = Keys(names, replaceable)
    token = _keys.set(keys)
    try:
        yield keys.written
    finally:
        _keys.reset(token)


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
