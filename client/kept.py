"""What servers have kept of a picture's inputs: the embeddings, which are the same in each step, are sent once.

No server has to have them. One that does not know them, because another began the picture or because it had no more
room, says so, and they are sent again.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable

from ditforge.client.answer import Inputs

MOST_LOST = 2  # times that what a server at an address had kept was gone, after which everything is sent there


class KeptInputs:
    """The labels of one picture's inputs, and which servers have kept them."""

    def __init__(self) -> None:
        self._labels: dict[tuple[int, ...], tuple[list[object], str]] = {}
        self._there: set[tuple[str, str]] = set()
        self._lost: Counter[str] = Counter()

    def label(self, inputs: Inputs, names: Iterable[str]) -> str:
        """The label of those of the inputs that are in `names`. The same arrays have the same label in each step."""
        arrays: list[object] = [inputs[name] for name in names if name in inputs]
        key = tuple(map(id, arrays))
        if key not in self._labels:
            self._labels[key] = arrays, uuid.uuid4().hex  # the arrays are held, so that no others get their ids
        return self._labels[key][1]

    def has(self, url: str, label: str) -> bool:
        """Whether the server at `url` may still have what is called `label`."""
        return (url, label) in self._there and self._lost[url] < MOST_LOST

    def sent(self, url: str, label: str) -> None:
        """Note that the server has it now."""
        self._there.add((url, label))

    def lost(self, url: str, label: str) -> None:
        """Note that it does not have it: it started anew, needed the room, or is one of several at its address."""
        self._there.discard((url, label))
        self._lost[url] += 1
