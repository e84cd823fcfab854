"""The client's warnings. Each names the line of the user's program that called the client.

A warning about a server is given only once.
"""

from __future__ import annotations

import sys
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ditforge.client.failures import short
from ditforge.errors import DitforgeWarning

INSIDE = ("ditforge.client.", "ditforge.arguments")


@dataclass(frozen=True)
class Line:
    """A line of a user's program: its file, its number, and the global names of its module."""

    file: str
    number: int
    names: dict[str, Any]

    @classmethod
    def of(cls, frame: FrameType) -> Line:
        """The line that a frame is executing."""
        return cls(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


# The line that called AsyncClient. By the time that the picture is made, its frame has ended or moved on.
CALLER: ContextVar[Line | None] = ContextVar("ditforge.client.caller", default=None)


class Told:
    """The warnings of a client about its servers. Each is given only once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def left_out(self, url: str, why: str, servers: int) -> None:
        """Warn that the server at `url` is not used, if it is one of several. For a single one, an error says so."""
        if servers > 1:
            self._warn(f"{url} is left out: {why}")

    def of_engines(self, url: str, mine: str, theirs: str, servers: int) -> None:
        """Warn that the server at `url` serves the engines `theirs`, and that the picture was begun with `mine`."""
        why = f"it serves the engines {short(theirs)}, and the picture was begun with {short(mine)}"
        if mine == theirs:
            why = f"it describes the engines {short(mine)} otherwise than the server that the picture was begun at"
        self.left_out(url, why, servers)

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warn(text)


def warn(text: str) -> None:
    """Give a DitforgeWarning for the line that called the client."""
    line = CALLER.get() or caller()
    registry = line.names.setdefault("__warningregistry__", {})  # where warnings.warn, too, keeps what it has said
    module = line.names.get("__name__") or "<unknown>"
    warnings.warn_explicit(text, DitforgeWarning, line.file, line.number, module, registry)


def caller() -> Line:
    """The line that called the client.

    It is the outermost such line: a user's sampler, which the client calls, may call the client in turn.
    """
    frame: FrameType | None = sys._getframe()
    found = frame
    while frame and frame.f_back:
        if frame.f_globals.get("__name__", "").startswith(INSIDE):
            found = frame.f_back
        frame = frame.f_back
    assert found is not None
    return Line.of(found)
