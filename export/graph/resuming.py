"""What an interrupted export had finished, kept beside its target, so that the next run goes on from there."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ditforge import manifest
from ditforge.errors import UserError
from ditforge.manifest import Component

WORTH = 256 * 10**6  # bytes of a component that is kept; a smaller one is made again in seconds


class Record(BaseModel):
    """Beside the files of a finished component: what it is, and `key`, what it was made from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: dict[str, str]
    component: Component


@dataclass(frozen=True)
class Unfinished:
    """The folder `.NAME.unfinished` beside an export's target NAME. Its files are hard links, which take no space.

    `key` is what the export is made from: components of another one are of no use. On file systems without hard links,
    nothing is kept.
    """

    folder: Path
    key: dict[str, str]

    @classmethod
    def beside(cls, target: Path, key: dict[str, str]) -> Unfinished:
        """That of an export to the folder `target`."""
        target = Path(os.path.realpath(target))
        return cls(target.with_name(f".{target.name}.unfinished"), key)

    def keep(self, name: str, component: Component, made: Path) -> None:
        """Keep the finished component `name`, whose files are in the folder `made`, if it is large."""
        if sum(file.size for file in component.files.values()) < WORTH:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            record = Record(key=self.key, component=component)
            self._record(name).write_text(record.model_dump_json())  # first: what it names can be removed again
            for file in component.files:
                (self.folder / file).unlink(missing_ok=True)  # of a record that was damaged
                os.link(made / file, self.folder / file)
        except OSError:
            self._drop(name)
            self._remove_if_empty()

    def kept(self) -> dict[str, Component]:
        """The components that an earlier run has finished, as far as sizes tell."""
        found = {path.stem: self._read(path.stem) for path in sorted(self.folder.glob("*.json"))}
        return {
            name: record.component
            for name, record in found.items()
            if record and record.key == self.key and manifest.is_whole(self.folder, {name: record.component})
        }

    def take(self, name: str, into: Path) -> Component | None:
        """Put the component `name` into the folder `into`; None if there is none that is undamaged."""
        component = self.kept().get(name)
        if component is None:
            return None
        try:
            manifest.check_files(self.folder, component.files, "")
            for file in component.files:
                os.link(self.folder / file, into / file)
        except (UserError, OSError):
            for file in component.files:
                (into / file).unlink(missing_ok=True)
            return None
        return component

    def drop_others(self) -> None:
        """Remove the components of another export, or of a damaged record."""
        kept = self.kept()
        for path in sorted(self.folder.glob("*.json")):
            if path.stem not in kept:
                self._drop(path.stem)
        self._remove_if_empty()

    def drop_all(self) -> None:
        """Remove all of it, when the export is whole."""
        for path in sorted(self.folder.glob("*.json")):
            self._drop(path.stem)
        self._remove_if_empty()

    def _record(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> Record | None:
        try:
            record = Record.model_validate_json(self._record(name).read_bytes())
        except (OSError, ValidationError):
            return None
        return record if all(Path(file).name == file for file in record.component.files) else None

    def _drop(self, name: str) -> None:
        """Only what the record names: nobody's other files are deleted."""
        record = self._read(name)
        for file in record.component.files if record else ():
            (self.folder / file).unlink(missing_ok=True)
        self._record(name).unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            self.folder.rmdir()
