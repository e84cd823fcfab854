"""What is read of a checkpoint, and what is not: nothing that a file holds is left out without a word."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

from ditforge.errors import DitforgeWarning, UserError
from ditforge.option import option, setting

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
    variants: the variants that the user asked for: of files, such as fp16, or of a model, such as dev.
    read: how many tensors are read, by component.
    notes: what is not read, and what was chosen, each once.
    offered: the variants that there were to choose from.
    """

    strict: bool = False
    variants: tuple[str, ...] = ()
    read: dict[str, int] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)
    offered: list[str] = field(default_factory=list)

    def add(self, what: str, why: str, expected: bool = False) -> None:
        """Add a note, unless it is there already."""
        note = Note(what, why, expected)
        if note not in self.notes:
            self.notes.append(note)

    def choose(self, choices: Iterable[str]) -> str | None:
        """Return the variant of `choices` that the user asked for; None if the user asked for none of them.

        Raises UserError if the user asked for several of them.
        """
        choices = list(choices)
        self.offered += [choice for choice in choices if choice not in self.offered]
        asked = [choice for choice in choices if choice in self.variants]
        if len(asked) > 1:
            problem = f"the variants {', '.join(asked)} exclude each other"
            raise UserError(problem, f"{setting('variant', asked[0])}, without the others")
        return asked[0] if asked else None

    @property
    def unexpected(self) -> list[Note]:
        """The notes that are warnings."""
        return [note for note in self.notes if not note.expected]

    def lines(self) -> list[str]:
        """Describe what was read and everything that was noted, one line each."""
        read = [f"{component}: {count} tensors are read" for component, count in self.read.items()]
        return [*read, *(str(note) for note in self.notes if note.expected)]

    def conclude(self) -> None:
        """Give one DitforgeWarning for each unexpected note; if `strict`, raise one UserError with all of them.

        Raises UserError too if the user asked for a variant that was nowhere to be chosen. It is called when everything
        has been opened and checked, and before anything is written.
        """
        if missing := [variant for variant in self.variants if variant not in self.offered]:
            choices = [setting("variant", choice) for choice in self.offered]
            fix = ", or ".join(map(str, choices)) or f"leave out {option('variant')}"
            raise UserError(f"this checkpoint has no variant {missing[0]!r}", fix)
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
