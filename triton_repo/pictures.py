"""Keeps track of the pictures that are being made, because a server that stops finishes these and begins no others.

A picture consists of many requests, none of which depends on this server. Clients send the same `ditforge-picture` in
the metadata of all requests of a picture. A request without one counts as a picture of its own.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

IDLE = 2.0  # seconds without a request after which a picture counts as finished, or as gone on with elsewhere
IDLE_DECODED = 0.5  # the same for one that was decoded last: there may be another tile, but no step
REMEMBERED = 60.0  # seconds for which a picture can go on after a pause
MOST = 10_000  # the most pictures that are remembered, because a stranger can invent names
LONGEST_NAME = 64


@dataclass
class Picture:
    """When a picture was last asked for, whether the decoder was, and how many of its requests are being answered."""

    seen: float
    decoded: bool = False
    requests: int = 0


class Pictures:
    """The pictures of the last minute."""

    def __init__(self) -> None:
        self.known: OrderedDict[str, Picture] = OrderedDict()
        self.anonymous = 0  # requests in flight that belong to no picture

    def knows(self, name: str | None) -> bool:
        """Return whether a request of that picture was seen lately."""
        self.forget()
        return name in self.known

    @contextmanager
    def request(self, name: str | None, decodes: bool = False) -> Iterator[None]:
        """While a request of the picture called `name` is answered; `decodes`: it is for the decoder."""
        if name is None or len(name) > LONGEST_NAME:
            self.anonymous += 1
            try:
                yield
            finally:
                self.anonymous -= 1
            return
        picture = self.known.setdefault(name, Picture(time.monotonic()))
        self.touch(name, picture)
        self.forget()
        picture.requests += 1
        picture.decoded = decodes
        try:
            yield
        finally:
            picture.requests -= 1
            self.touch(name, picture)

    def touch(self, name: str, picture: Picture) -> None:
        """Make the picture the one that was seen last."""
        picture.seen = time.monotonic()
        self.known[name] = picture
        self.known.move_to_end(name)

    def forget(self) -> None:
        """Remove the pictures that were not seen for long, and the oldest ones if there are too many."""
        now = time.monotonic()
        while self.known:
            name, picture = next(iter(self.known.items()))
            too_many = len(self.known) > MOST
            if now - picture.seen < REMEMBERED and not too_many:
                break
            if picture.requests and not too_many:  # it is being asked for now
                picture.seen = now
                self.known.move_to_end(name)
            else:
                del self.known[name]

    def unfinished(self) -> int:
        """Count the pictures that would not be finished if the server ended now."""
        return self.anonymous + sum(p.requests > 0 or (not p.decoded and is_active(p)) for p in self.known.values())

    def active(self) -> int:
        """Count the pictures to wait for: a request of theirs is being answered, or may follow."""
        return self.anonymous + sum(is_active(picture) for picture in self.known.values())


def is_active(picture: Picture) -> bool:
    """Return whether a request of the picture is being answered, or may follow soon."""
    idle = IDLE_DECODED if picture.decoded else IDLE
    return picture.requests > 0 or time.monotonic() - picture.seen < idle
