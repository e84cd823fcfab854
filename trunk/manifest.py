"""The manifest.json that each stage writes for the next one. It describes what the folder holds.

`export` writes one beside the ONNX graphs, `build` beside the engines, and `repo` into the model repository. It lists
every file with its size and SHA-256, so that a stage can tell a complete folder from a damaged or half-copied one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from ditforge import __version__, digests
from ditforge.contract import DTYPES, IDS, LATENTS, TOKENIZER, VARYING, VELOCITY
from ditforge.errors import UserError
from ditforge.footprint import Footprint
from ditforge.model import Model
from ditforge.option import command
from ditforge.placement import Placement
from ditforge.small_files import no_key_twice, read_bytes

FILE_NAME = "manifest.json"
FORMAT = 2
READABLE = (1, 2)

Kind = Literal["onnx", "engines", "repository"]
# A key of `Manifest.origin` and its values: whether the user asked for the precision of the export, or for the GPU that
# it suits.
PRECISION_CHOICE = "precision_choice"
ASKED, BY_DEFAULT = "asked for", "by default"
WEIGHTS = ".data"  # how the name of a file of weights beside a graph ends; a graph without weights has an empty one
LARGEST_DIM = 2**31 - 1
LONGEST_NAME = 200  # characters of a component's name, or of a folder or file
IN_WORDS = {"onnx": "a folder of ONNX graphs", "engines": "a folder of engines", "repository": "a model repository"}
NEXT_COMMAND = {
    "onnx": "ditforge export CHECKPOINT --out DIR",
    "engines": "ditforge build ONNX_DIR --gpu GPU --out DIR",
    "repository": "ditforge repo ENGINE_DIR --out DIR",
}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Record):
    """A file of a component: its size in bytes and its SHA-256 in hexadecimal."""

    size: int = Field(ge=0)
    sha256: str


class Tensor(_Record):
    """An input or output: Triton's data type name (FP32, INT32, BYTES, …) and its shape, batch first.

    A dimension is a number, or a name if it varies.
    """

    dtype: str
    shape: tuple[int | str, ...]


class Component(_Record):
    """One network, or the tokenizer.

    files: its files, by their paths relative to the manifest.
    precision: the name of the precision as users know it.
    reason: why it has this precision, in words.
    dtype: the number format of everything that is not 8-bit: fp32, fp16 or bf16.
    layers: the precision of each layer that a quantisation considered.
    footprint: how much of a GPU's memory the network takes, or None if it was not measured.
    """

    files: dict[str, File]
    precision: str
    dtype: str = ""
    reason: str
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    layers: dict[str, str] = {}
    footprint: Footprint | None = None

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, File]) -> dict[str, File]:
        for name in files:
            parts = PurePosixPath(name).parts
            if PurePosixPath(name).is_absolute() or ".." in parts:
                raise ValueError(f"{name} is outside the folder")
            if not parts or "\0" in name or max(map(len, parts)) > LONGEST_NAME:
                raise ValueError(f"{name[:80]!r} is no name of a file")
        return files


class Engine(_Record):
    """How a component's engine was made, and how it is used.

    target: the device that it was compiled for: cpu, or compute capabilities such as sm_89.
    cache_key: everything that the engine depends on. It is compiled again only if this changes.
    triton_backend: Triton's own backend that executes it, or empty if ditforge's code does.
    max_batch: the largest batch that it takes, or None if it takes any.
    placement: where it is in memory, and when.
    segment_files: if it is cut into segments, the files of each, in the order in which they run; otherwise empty.
    """

    compiler: str
    compiler_version: str
    target: str
    cache_key: dict[str, str]
    triton_backend: str = ""
    max_batch: int | None = Field(default=None, ge=1)
    placement: Placement = Placement()
    segment_files: tuple[tuple[str, ...], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_format_1(cls, content: Any) -> Any:
        """Convert an engine of format 1, in which the segments' files and the number on demand were separate fields."""
        if not isinstance(content, dict) or not {"segments", "on_demand"} & content.keys():
            return content
        files, on_demand = content.get("segments", ()), content.get("on_demand", 0)
        if not isinstance(files, list | tuple):
            raise ValueError(f"segments must be a list, got {files!r}")
        rest = {name: value for name, value in content.items() if name not in ("segments", "on_demand")}
        placement = {"segments": max(1, len(files)), "on_demand": on_demand}
        backend = "tensorrt" if content.get("compiler") == "tensorrt" else ""
        return {**rest, "placement": placement, "segment_files": files, "triton_backend": backend}

    @model_validator(mode="after")
    def _as_its_key_says(self) -> Self:
        """The cache key, where it is kept, says again which compiler made the engine, and for what."""
        for field in ("compiler", "compiler_version", "target"):
            said = self.cache_key.get(field, own := getattr(self, field))
            if own != said:
                raise ValueError(f"{field} is {own!r}, and cache_key says {said!r}")
        return self

    def check_segments(self, files: Iterable[str]) -> None:
        """Raise ValueError unless the segments are as many as are placed, and share out the engine's `files`."""
        files, parts = sorted(files), self.segment_files
        if max(1, len(parts)) != self.placement.segments:
            raise ValueError(f"segment_files has {len(parts)} parts, and placement has {self.placement.segments}")
        if parts and (not all(parts) or sorted(file for part in parts for file in part) != files):
            shown = [list(part) for part in parts]
            raise ValueError(f"segment_files does not share out the files {', '.join(files)}, but has {shown}")


class Manifest(_Record):
    """What a folder holds.

    components: the networks and the tokenizer, in the order in which data flows through them.
    engines: the engines, by the names of their components; empty in an export.
    source: what an export or a repository was made from, so that the same one is not made twice.
    origin: what the checkpoint was made from, in words for people. Each stage passes it on to the next.
    """

    format: int = FORMAT
    kind: Kind
    ditforge: str = __version__
    model: Model
    components: dict[str, Component]
    engines: dict[str, Engine] = {}
    source: dict[str, str] = {}
    origin: dict[str, str] = {}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.model.max_tokens:
            raise ValueError("model.max_tokens names no text encoder")
        for name, component in self.components.items():
            if not re.fullmatch(r"[\w-]+", name, re.ASCII) or len(name) > LONGEST_NAME:
                raise ValueError(f"components: {name[:80]!r} is no name of a network")
            for tensor, described in (component.inputs | component.outputs).items():
                where = f"components.{name}: the tensor {tensor}"
                _check_tensor(where, described)
                _check_width(where, tensor, described, self.model)
        if self.kind == "onnx" and self.engines:
            raise ValueError(f"kind is onnx, and there are engines, such as {next(iter(self.engines))}")
        if strange := sorted(self.engines.keys() - self.components.keys()):
            raise ValueError(f"engines.{strange[0]} is the engine of no component")
        for name, engine in self.engines.items():
            files: Iterable[str] = self.components[name].files
            if self.kind == "repository":  # there, they are in a folder of their own, in which they keep their names
                files = [PurePosixPath(file).name for file in files]
            try:
                engine.check_segments(files)
            except ValueError as error:
                raise ValueError(f"engines.{name}: {error}") from None
        return self


def _check_tensor(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is one of those that graphs take and give (docs/design.md)."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has the dtype {tensor.dtype!r}, which is none of {', '.join(DTYPES)}")
    if tensor.shape[:1] != VARYING[:1]:
        raise ValueError(f"{name} must have the batch as its first dimension, got {list(tensor.shape)}")
    for dim in tensor.shape:
        if dim not in VARYING if isinstance(dim, str) else not 0 < dim <= LARGEST_DIM:
            raise ValueError(f"{name} has the dimension {dim!r}, no number above 0 and none of {', '.join(VARYING)}")


def _check_width(where: str, name: str, tensor: Tensor, model: Model) -> None:
    """Raise ValueError if the model says another second dimension, of latents or of token ids [B, width, …]."""
    if name in (LATENTS, VELOCITY):
        said: int | None = model.latent_channels
    else:
        said = model.max_tokens.get(name.removesuffix(IDS)) if name.endswith(IDS) else None
    if said is not None and tensor.shape[1:2] != (said,):
        raise ValueError(f"{where} has the shape {list(tensor.shape)}, and by model its second dimension is {said}")


def read(folder: Path, kind: Kind) -> Manifest:
    """The manifest of `folder`. Raises UserError if it is missing, of another kind than `kind`, or unreadable."""
    path = folder / FILE_NAME
    make = f"{NEXT_COMMAND[kind]}   makes such a folder"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", make)
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE_NAME}, so it is not a folder of {kind}", make)
    manifest = parse(path)
    if manifest.kind != kind:
        held = manifest.kind
        fix = command("ditforge build {} --out ENGINES   makes engines of them", folder) if held == "onnx" else make
        raise UserError(f"{folder} is {IN_WORDS[held]}, and {IN_WORDS[kind]} is what this takes", fix)
    return manifest


def read_any(folder: Path) -> Manifest:
    """The manifest of a folder that any stage wrote. Raises UserError if there is none."""
    if not (folder / FILE_NAME).is_file():
        raise UserError(f"{folder} has no {FILE_NAME}: no stage of ditforge wrote it", "give another folder")
    return parse(folder / FILE_NAME)


def earlier(folder: Path, kind: Kind) -> Manifest | None:
    """The manifest that an earlier run left in `folder`, if there is one of `kind` that this version reads."""
    try:
        return read(folder, kind)
    except UserError:
        return None


def parse(path: Path) -> Manifest:
    """The manifest in the file `path`, of whatever kind. Raises UserError if it is not one that this version reads."""
    try:
        content = json.loads(read_bytes(path), object_pairs_hook=no_key_twice)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        if type(content.get("format")) is not int or content["format"] not in READABLE:  # True == 1 == 1.0
            known = " and ".join(map(str, READABLE))
            problem = f"{path} has format {content.get('format')!r}, this ditforge {__version__} reads formats {known}"
            raise UserError(problem, "make the folder again with this version")
        return Manifest.model_validate(content)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path} is damaged: {f'{where}: ' if where else ''}{what}", "make the folder again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}", "make the folder again") from error


def write(manifest: Manifest, folder: Path) -> None:
    """Write `manifest` into `folder`. It must be the last file written: a folder with a manifest counts as complete."""
    (folder / FILE_NAME).write_text(as_text(manifest))


def as_text(manifest: Manifest) -> str:
    """The content of the file, as JSON."""
    return manifest.model_dump_json(indent=2) + "\n"


def describe(path: Path, anew: bool = False) -> File:
    """The size and the SHA-256 of the file at `path`. `anew` reads a file that has not changed since it was read."""
    digest = digests.sha256_of(path, anew)
    return File(size=path.stat().st_size, sha256=digest)


def digest(components: dict[str, Component]) -> str:
    """The SHA-256, in hexadecimal, of the names and digests of all files. Folders of equal content have the same."""
    files = [(name, file.sha256) for component in components.values() for name, file in component.files.items()]
    return hashlib.sha256("".join(f"{sha256}  {name}\n" for name, sha256 in sorted(files)).encode()).hexdigest()


def check_components(found: Manifest, folder: Path, needed: Iterable[str]) -> None:
    """Raise UserError unless each component of `needed` is in the manifest of `folder`, and all components have files.

    Engines must be of all components but the tokenizer.
    """
    path, again = folder / FILE_NAME, f"{NEXT_COMMAND[found.kind]}   again"
    for name in needed:
        if name not in found.components:
            known = ", ".join(found.components) or "nothing"
            problem = f"{path} has no component {name}, which is needed; components holds {known}"
            # A build has what its export has, whose other networks it may be asked for alone.
            exported = again if found.kind == "onnx" else f"{again}, from an export that has {name}"
            raise UserError(problem, exported)
    for name, component in found.components.items():
        sizes = {file: described.size for file, described in component.files.items() if not file.endswith(WEIGHTS)}
        if empty := next((file for file, size in sizes.items() if not size), ""):
            raise UserError(f"{path} is damaged: components.{name}.files: {empty} is empty", again)
        if not component.files:
            raise UserError(f"{path} is damaged: components.{name}.files has no file", again)
        if found.kind == "engines" and name != TOKENIZER and name not in found.engines:
            raise UserError(f"{path} is damaged: engines has no {name}", again)


def is_whole(folder: Path, components: dict[str, Component]) -> bool:
    """Whether every file of the components is in `folder` and has the right size."""
    files = [item for component in components.values() for item in component.files.items()]
    return all((folder / name).is_file() and (folder / name).stat().st_size == file.size for name, file in files)


def first_difference(before: dict[str, str], now: dict[str, str]) -> str:
    """Say in words in which entry two cache keys differ first. Empty if they are the same."""
    for field in dict.fromkeys((*now, *before)):
        if before.get(field) != now.get(field):
            shown = "changed" if field.startswith("sha256") else f"was {before.get(field)}, is {now.get(field)}"
            return f"{field} {shown}"
    return ""


def check_files(folder: Path, files: dict[str, File], fix: str, anew: bool = False) -> None:
    """Check that every file is there and unchanged. Raises UserError, with `fix`, for the first that is not.

    `anew` reads large files that have not changed since they were read (see digests.py).
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing", fix)
        size = path.stat().st_size
        if size != expected.size:
            raise UserError(f"{path} has {size} bytes, the manifest says {expected.size}", fix)
        if describe(path, anew).sha256 != expected.sha256:
            raise UserError(f"{path} is damaged: its SHA-256 is not the manifest's", fix)
