"""What the user of a client was warned of: of each server that others stand in for, once, and why."""

from __future__ import annotations

import sys
import warnings

from ditforge.client.failures import short
from ditforge.errors import DitforgeWarning


class Told:
    """The warnings of a client, of which each is given once."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def left_out(self, url: str, why: str, servers: int) -> None:
        """Warn that the server at `url` is not used, if it is one of several; else an error says so."""
        if servers > 1:
            self._warn(f"{url} is left out: {why}")

    def of_engines(self, url: str, mine: str, theirs: str, servers: int) -> None:
        """Warn that the server at `url` serves the engines `theirs`, and others `mine`."""
        self.left_out(
            url, f"it serves the engines {short(theirs)}, and the picture was begun with {short(mine)}", servers
        )

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, DitforgeWarning, stacklevel=callers())


def callers() -> int:
    """How far up the first caller is that is not the client itself: a warning is about what that one asked for."""
    depth, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("ditforge.client."):
        depth, frame = depth + 1, frame.f_back
    return depth
