"""The commands, one file each: the function that is called like its file is the command.

A new command is a new file. Each imports what it needs when it runs, so that `ditforge --help` loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules

# In what order they are listed; others come after these, by name.
ORDER = [
    "export",
    "calibrate",
    "build",
    "plan",
    "verify",
    "repo",
    "serve",
    "generate",
    "up",
    "gpus",
    "doctor",
    "inspect",
]


def commands() -> Iterator[Callable[..., None]]:
    """All commands."""
    names = sorted(module.name for module in iter_modules(__path__))
    for name in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        yield getattr(import_module(f"{__name__}.{name}"), name)
