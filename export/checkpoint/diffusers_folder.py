"""A checkpoint as a diffusers folder: which networks it names, their configurations, and where their weights are."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.weights import Weights, open_weights
from ditforge.small_files import read_json_object

if TYPE_CHECKING:
    from ditforge.export.checkpoint.lazy_tensors import Lazy

INDEX = "model_index.json"
CONFIGS = Path(__file__).parents[1] / "configs"  # of published models: folders without weights and vocabularies


@dataclass(frozen=True)
class Checkpoint:
    """A diffusers folder. `pipeline` is the class that its model_index.json names, e.g. FluxPipeline.

    Where there are no weights, and random ones take their place, `seed` is what they are made from. What comes from
    elsewhere than the folder (a single file, LoRAs: source.py) is in `title`, the model's name, `tensors`, by
    component and name, `configs`, by component and file, and `loras`, as FILE:STRENGTH without the folders.
    `repositories` says what of it is from the Hub, and of which commit.
    """

    folder: Path
    pipeline: str
    seed: int | None = None
    title: str | None = None
    tensors: Mapping[str, Mapping[str, Lazy]] = field(default_factory=dict)
    configs: Mapping[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    loras: tuple[str, ...] = ()
    repositories: str = ""

    @property
    def name(self) -> str:
        """The name of the folder or file, by which people know the model."""
        return self.title or self.folder.resolve().name

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """The configuration of a component (`transformer`, `vae`, …) as its file has it."""
        given = self.configs.get((component, file))
        return read_json(self.folder / component / file) if given is None else given

    def weights(self, component: str) -> Weights:
        """The weights of a component, opened and checked for completeness, none of them read."""
        if component not in self.tensors:
            return open_weights(self.folder / component)
        from ditforge.export.checkpoint.lazy_tensors import as_weights

        return as_weights(self.folder / component, self.tensors[component])


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open the diffusers folder. Raises UserError if it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "give the folder of a checkpoint in diffusers' layout")
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{folder} has no {INDEX}, so it is not a checkpoint in diffusers' layout",
            "download the whole repository of the model, with its subfolders transformer, vae, text_encoder, …",
        )
    return Checkpoint(folder, str(read_json(folder / INDEX).get("_class_name", "")))


def t5_parts(index: dict[str, Any]) -> list[str]:
    """What an index calls T5 and its tokenizer, whose class does not say whose it is; nothing where it has no T5."""
    entries = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    encoders = [name for name, cls in entries.items() if str(cls).startswith("T5Encoder")]
    return [*encoders, *(name.replace("text_encoder", "tokenizer") for name in encoders)]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's file. Raises UserError if the file is missing, or holds something else."""
    return read_json_object(path, "checkpoint")


def with_defaults(cls: Any, config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of the constructor of `cls` for the keys that it leaves out, as diffusers reads it."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty} | config
