"""Finds out what a file or folder is: the output of a stage, a checkpoint, a file of tensors, or a picture."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from ditforge import manifest
from ditforge.errors import UserError
from ditforge.manifest import Component, Engine, Manifest
from ditforge.model import Model
from ditforge.option import command
from ditforge.placement import Placement

if TYPE_CHECKING:
    from ditforge.export.checkpoint.description import TensorFile

GIVE = "give a folder that a stage wrote, a checkpoint, a .safetensors or .gguf file, or a picture"
TENSORS = {".safetensors", ".sft", ".gguf"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
PICTURE_START = re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
BLOCK = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Layers:
    """Layers of one precision whose names differ only in the number of the block. `name` has a * for this number."""

    name: str
    count: int
    precision: str


@dataclass(frozen=True)
class Port:
    """An input or output: Triton's name of its dtype, and its shape, with a name for each dimension that varies."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Part:
    """A network, or the tokenizer, in a folder that a stage wrote.

    size: the bytes of its files.
    compiler, compiler_version, target: how its engine was compiled, and for what; empty if it has no engine.
    segments, on_demand: the number of segments, and how many of these are loaded for each call and then freed. The
        others are resident.
    """

    name: str
    precision: str
    reason: str
    size: int
    compiler: str
    compiler_version: str
    target: str
    segments: int
    on_demand: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    layers: tuple[Layers, ...]

    @property
    def residency(self) -> str:
        """Say in words when the engine is in memory."""
        if not self.target:
            return ""
        if self.on_demand == 0:
            return "resident"
        return "on-demand" if self.on_demand == self.segments else f"{self.on_demand} of {self.segments} on-demand"


@dataclass(frozen=True)
class Pictures:
    """The sizes of pictures that can be made, in pixels.

    Heights and widths go from `least` to `most` in steps of `step`. If `sizes` is not empty, its (height, width) are
    the only sizes. vae_tile is the side of the autoencoder's tiles, or None if it takes whole pictures.
    """

    least: int
    most: int
    step: int
    default: int
    sizes: tuple[tuple[int, int], ...]
    vae_tile: int | None


@dataclass(frozen=True)
class StageFolder:
    """The output of a stage.

    kind: onnx, engines or repository.
    size: the bytes of all files.
    sha256: a digest of the digests of all files, which is the same for equal folders.
    origin: what it was made from, as names and values.
    max_batch: the largest batch, or None if there is no limit.
    """

    kind: str
    path: str
    model: str
    ditforge: str
    size: int
    sha256: str
    origin: dict[str, str]
    pictures: Pictures
    max_batch: int | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class CheckpointPart:
    """A component of a checkpoint in diffusers' layout.

    weights: the bytes of the files with its weights. files: those that are read; () if none can be.
    dtypes: the bytes of each dtype. variants: the variants that its files have, such as fp16.
    quantisation: the method that its configuration names; empty if it names none.
    """

    name: str
    class_name: str
    weights: int
    files: tuple[str, ...]
    dtypes: dict[str, int]
    variants: tuple[str, ...]
    quantisation: str


@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint in diffusers' layout, or some networks of one.

    kind: checkpoint, or part of a checkpoint. pipeline: diffusers' class. family, variant: the titles of its model's
    family, and of the model, or of those that it can be; empty if they are not known. weights: bytes of weights.
    noted: what is not read or was chosen, and why. export: the command that exports it, or empty if none does.
    problem, fix: why it cannot be exported as it is, and what to do; empty if it can.
    """

    kind: str
    path: str
    pipeline: str
    family: str
    variant: str
    weights: int
    parts: tuple[CheckpointPart, ...]
    noted: tuple[str, ...]
    export: str
    problem: str
    fix: str


@dataclass(frozen=True)
class Picture:
    """A picture that ditforge made. kind: picture. parameters: the options that make it again."""

    kind: str
    path: str
    parameters: dict[str, Any]


Contents = Union[StageFolder, CheckpointFolder, "TensorFile", Picture]


def look_into(path: Path) -> Contents:
    """Find out what the file or folder is. Raises UserError if it is none of the above, or does not exist."""
    try:
        path.stat()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", GIVE) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", GIVE) from None
    if (path / manifest.FILE_NAME).is_file():
        return stage_folder(path, manifest.parse(path / manifest.FILE_NAME))
    if path.is_file() and is_picture(path):
        from ditforge.client.picture_file import read_parameters

        return Picture("picture", str(path), read_parameters(path))
    if path.is_file() and path.suffix not in TENSORS and (path.parent / manifest.FILE_NAME).is_file():
        problem = f"{path} is one file of what a stage of ditforge wrote"
        raise UserError(problem, command("ditforge inspect {}", path.parent))
    if path.is_file():
        from ditforge.export.checkpoint.description import describe_file

        return describe_file(path)
    if path.is_dir():
        from ditforge.export.checkpoint.folder_description import describe_folder

        return describe_folder(path)
    raise UserError(f"{path} is no folder, and not a regular file", GIVE)


def is_picture(path: Path) -> bool:
    """Return whether the file has the name of a picture, or begins as one does."""
    with path.open("rb") as opened:
        return path.suffix.lower() in PICTURES or PICTURE_START.match(opened.read(12)) is not None


def stage_folder(path: Path, found: Manifest) -> StageFolder:
    """Describe the output of a stage by its manifest."""
    batches = [engine.max_batch for engine in found.engines.values() if engine.max_batch]
    if found.kind == "repository" and found.source.get("max_batch", "").isdecimal():
        batches.append(int(found.source["max_batch"]))
    parts = tuple(part(name, one, found.engines.get(name)) for name, one in found.components.items())
    return StageFolder(
        kind=found.kind,
        path=str(path),
        model=found.model.name,
        ditforge=found.ditforge,
        size=sum(one.size for one in parts),
        sha256=manifest.digest(found.components),
        origin=found.origin,
        pictures=pictures(found.model),
        max_batch=min(batches, default=None),
        parts=parts,
    )


def pictures(model: Model) -> Pictures:
    """The sizes of pictures that a model, or its engines, can make."""
    step = model.size_multiple
    least, most = -(-model.min_size // step) * step, model.max_size // step * step
    return Pictures(least, most, step, model.default_size, model.sizes, model.vae_tile)


def sizes_in_words(pictures: Pictures) -> str:
    """The sizes of pictures that can be made, in words."""
    tiles = f"; the autoencoder takes tiles of {pictures.vae_tile}" if pictures.vae_tile else ""
    if pictures.sizes:
        named = ", ".join(f"{width}x{height}" for height, width in pictures.sizes)
        return f"only {named} pixels (width x height){tiles}"
    steps = f"in steps of {pictures.step}, by default {pictures.default}"
    return f"{pictures.least} to {pictures.most} pixels {steps}{tiles}"


def part(name: str, component: Component, engine: Engine | None) -> Part:
    """Describe a network, and its engine if there is one."""
    made = (engine.compiler, engine.compiler_version, engine.target) if engine else ("", "", "")
    placement = engine.placement if engine else Placement()
    cut = placement.segments, placement.on_demand
    counts = Counter((BLOCK.sub(".*.", layer), precision) for layer, precision in component.layers.items())
    layers = tuple(Layers(layer, count, precision) for (layer, precision), count in counts.items())
    size = sum(file.size for file in component.files.values())
    inputs, outputs = ports(component.inputs), ports(component.outputs)
    return Part(name, component.precision, component.reason, size, *made, *cut, inputs, outputs, layers)


def ports(tensors: dict[str, manifest.Tensor]) -> tuple[Port, ...]:
    """Describe the inputs, or the outputs, of a network."""
    return tuple(Port(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
