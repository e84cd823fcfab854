"""The commands, one file each. The function with the same name as its file is the command.

A new command is a new file. Each imports what it needs when it runs, so that `ditforge --help` loads nothing heavy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules

# The order in which the commands are listed. Commands that are not named here come last, by name.
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
    """Import and yield all commands, in the order in which they are listed.

    A file that cannot be imported, or has no such function, is left out with a warning: the others still work.
    """
    names = sorted(module.name for module in iter_modules(__path__))
    for name in sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER)):
        try:
            yield getattr(import_module(f"{__name__}.{name}"), name)
        except Exception as error:
            print(f"warning: there is no command {name}: {type(error).__name__}: {error}", file=sys.stderr)
