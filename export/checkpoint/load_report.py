"""What is read of a checkpoint, and what is not: nothing that a file holds is left out without a word."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from ditforge.errors import DitforgeWarning, UserError
from ditforge.option import option

SHOWN = 3  # how many names a message lists


@dataclass(frozen=True)
class Note:
    """A part of a checkpoint that has no effect on the export, or a choice between several parts.

    what: the tensors, the fields of a configuration or the files, and where they are.
    why: the reason, to be read after "what: ".
    expected: True if every checkpoint of this kind has such a part and no export needs it, such as CLIP's
        `logit_scale`. It is then reported, but it is no warning.
    """

    what: str
    why: str
    expected: bool = False

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


@dataclass
class LoadReport:
    """A record that the readers of a checkpoint fill in while they open it.

    strict: whether conclude() raises an error in place of warnings.
    read: how many tensors are read, by component.
    notes: what is not read, and what was chosen, each once.
    """

    strict: bool = False
    read: dict[str, int] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def add(self, what: str, why: str, expected: bool = False) -> None:
        """Add a note, unless it is there already."""
        note = Note(what, why, expected)
        if note not in self.notes:
            self.notes.append(note)

    @property
    def unexpected(self) -> list[Note]:
        """The notes that are warnings."""
        return [note for note in self.notes if not note.expected]

    def conclude(self) -> None:
        """Give one DitforgeWarning for each unexpected note; if `strict`, raise one UserError with all of them.

        It is called when everything has been opened and checked, and before anything is written.
        """
        found = self.unexpected
        if found and self.strict:
            problem = "; ".join(map(str, found))
            raise UserError(problem, f"take these parts out of the files, or leave out {option('strict')}")
        for note in found:
            warnings.warn(str(note), DitforgeWarning, stacklevel=3)


def shown(names: Iterable[str]) -> str:
    """Return the first SHOWN names, and how many more there are, as text."""
    names = list(names)
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "no tensors") + rest
