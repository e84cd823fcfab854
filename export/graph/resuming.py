"""Keep the finished components of an interrupted export beside its target, so that the next run continues from them."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ditforge import manifest
from ditforge.errors import UserError
from ditforge.manifest import Component
from ditforge.real_path import real_path

WORTH = 256 * 10**6  # components of fewer bytes are not kept: they are made again in seconds


class Record(BaseModel):
    """The JSON file beside the files of a finished component: its description, and what it was made from (`key`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: dict[str, str]
    component: Component


@dataclass(frozen=True)
class Unfinished:
    """The folder `.NAME.unfinished` beside an export's target NAME. Its files are hard links, which take no space.

    `key` is what the export is made from; only components with the same key are used again. On file systems without
    hard links, nothing is kept.
    """

    folder: Path
    key: dict[str, str]

    @classmethod
    def beside(cls, target: Path, key: dict[str, str]) -> Unfinished:
        """Return the folder for an export to the folder `target`."""
        target = real_path(target)
        return cls(target.with_name(f".{target.name}.unfinished"), key)

    def keep(self, name: str, component: Component, made: Path) -> None:
        """Keep the finished component `name`, whose files are in the folder `made`, if it has at least WORTH bytes."""
        if sum(file.size for file in component.files.values()) < WORTH:
            return
        try:
            self.folder.mkdir(exist_ok=True)
            record = Record(key=self.key, component=component)
            # The record is written first, because only files that a record names are ever removed.
            self._record(name).write_text(record.model_dump_json())
            for file in component.files:
                (self.folder / file).unlink(missing_ok=True)  # left over if an earlier record was damaged
                os.link(made / file, self.folder / file)
        except OSError:
            self._drop(name)
            self._remove_if_empty()

    def kept(self) -> dict[str, Component]:
        """Return the components that an earlier run of this export finished, by name. Only file sizes are checked."""
        found = {path.stem: self._read(path.stem) for path in sorted(self.folder.glob("*.json"))}
        return {
            name: record.component
            for name, record in found.items()
            if record and record.key == self.key and manifest.is_whole(self.folder, {name: record.component})
        }

    def take(self, name: str, into: Path) -> Component | None:
        """Link the files of the kept component `name` into the folder `into`, after checking their contents.

        Returns None, and leaves nothing in `into`, if the component is not there or is damaged.
        """
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
        """Remove components of another export, and those whose record or files are damaged."""
        kept = self.kept()
        for path in sorted(self.folder.glob("*.json")):
            if path.stem not in kept:
                self._drop(path.stem)
        self._remove_if_empty()

    def drop_all(self) -> None:
        """Remove all kept components. This is done when the export is complete."""
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
        """Remove the component `name`: only the files that its record names, and the record itself."""
        record = self._read(name)
        for file in record.component.files if record else ():
            (self.folder / file).unlink(missing_ok=True)
        self._record(name).unlink(missing_ok=True)

    def _remove_if_empty(self) -> None:
        with suppress(OSError):
            self.folder.rmdir()
