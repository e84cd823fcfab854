"""What `ditforge plan` plans for: the networks of a checkpoint, which it measures, or those of an export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError

from ditforge import __version__, folders, manifest, small_files, terminal
from ditforge.cache import default_cache
from ditforge.downloading import downloaded
from ditforge.engines import gpus
from ditforge.engines.gpus import Target
from ditforge.engines.memory import memory_plan
from ditforge.engines.memory.memory_plan import Part
from ditforge.errors import UserError
from ditforge.footprint import Footprint
from ditforge.model import Model
from ditforge.suited import checked_around

if TYPE_CHECKING:
    from ditforge.export.checkpoint.diffusers_folder import Checkpoint
    from ditforge.export.checkpoint.source import CheckpointSource

# Compared with bf16, int8-weights makes an error of 0.9 % in the output of a linear, and fp8-weights one of 2.6 %.
T5, SMALLER_T5 = "t5", "int8-weights"
SHIPPED = "footprints.json"  # beside the configurations of a published model, written by scripts/measure_published.py
log = logging.getLogger(__name__)


class Measurement(BaseModel):
    """A model and the footprints of its networks in each precision, as they are kept in the cache."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Model
    footprints: dict[str, dict[str, Footprint]]


@dataclass(frozen=True)
class Subject:
    """What is planned for: a model with the networks of a checkpoint, or of an export, whose precision is fixed.

    footprints: network → "plain" (16-bit or fp32) and each possible 8-bit precision → the footprint; empty for an
        export.
    exported: the networks of an export; empty for a checkpoint.
    """

    model: Model
    footprints: dict[str, dict[str, Footprint]]
    exported: Sequence[Part] = ()

    def parts(self, target: Target, precision: str | None) -> tuple[str, Sequence[Part]]:
        """The precision for the GPU, and the networks in it. Raises UserError if the GPU lacks this precision."""
        if self.exported:
            return "as exported", self.exported
        chosen, around = choose_precision(target, precision)
        return chosen, [part(name, found, chosen, around) for name, found in self.footprints.items()]


def choose_precision(target: Target, precision: str | None) -> tuple[str, str]:
    """The precision for the GPU, and the dtype of the other layers. Raises UserError if the GPU lacks them."""
    from ditforge.export.quantisation.precision import PRECISIONS

    chosen = gpus.default_precision(target)[0] if precision is None else precision
    if chosen not in PRECISIONS:
        raise UserError(f"unknown precision {chosen!r}", f"use one of: {', '.join(PRECISIONS)}")
    return chosen, checked_around(chosen, gpus.default_activations(target), target)


def part(name: str, found: dict[str, Footprint], precision: str, around: str) -> Part:
    """The network called `name` in the chosen precision if it has that, or else in the dtype `around`.

    T5 can also be planned with 8-bit weights, or in fp32 on the CPU.
    """
    plain = found["plain"]
    if name != T5:
        return Part(name, {precision: found[precision]} if precision in found else {around: plain})
    in_fp32 = plain.weights * (1 if around == "fp32" else 2)
    return Part(name, {around: plain, SMALLER_T5: found[SMALLER_T5]}, cpu=in_fp32)


@dataclass(frozen=True)
class Wanted:
    """What the user asks to be planned: see `ditforge plan --help`."""

    source: CheckpointSource
    precision: str | None = None
    size: int | None = None


def read_subject(wanted: Wanted) -> Subject:
    """Read the checkpoint, the export, or the published model that the user named. Raises UserError for others."""
    path = wanted.source.path
    if (path / manifest.FILE_NAME).is_file() and manifest.read_any(path).kind == "onnx":
        asked = {
            "--text-encoders": wanted.source.text_encoders != "all",
            "--variant": bool(wanted.source.variant),
            "--text-length": wanted.source.text_length is not None,
        }
        if given := [option for option, is_given in asked.items() if is_given]:
            raise UserError(f"{path} is exported already, with {given[0]} or without", f"leave out {given[0]}")
        return exported(path, wanted)
    folders.check_checkpoint(path)
    found = read_measurement(replace(wanted, source=configurations(wanted.source)))
    check_size(found.model, wanted.size)
    return Subject(found.model, found.footprints)


def configurations(source: CheckpointSource) -> CheckpointSource:
    """The source with configurations that are here: those of a published model, or downloaded without the weights."""
    if source.path.exists():
        return source
    from ditforge.export.families import find_published, published_models

    if published := find_published(str(source.path)):
        return replace(source, path=published, random_weights=True)
    found = source if source.random_weights else downloaded(source, weights=False)
    if not found.path.exists():
        names = ", ".join(sorted(published_models()))
        raise UserError(f"{source.path} is not a folder", f"give that of a checkpoint, or a published model: {names}")
    return found


def read_measurement(wanted: Wanted) -> Measurement:
    """The measurement that the model comes with, or that an earlier run has kept; or else a new one, which is kept."""
    if shipped := read_shipped(wanted):
        return shipped
    file = kept_at(wanted)
    if kept := read_kept(file):
        return kept
    from ditforge.export.checkpoint.source import opened

    with opened(wanted.source) as checkpoint:
        found = measured(checkpoint, wanted)
    keep(found, file)
    return found


def read_shipped(wanted: Wanted) -> Measurement | None:
    """The measurement that a published model's configurations come with; None if the user asks for something else."""
    source = wanted.source
    asked = source.text_encoders, source.variant, source.text_length
    if not source.random_weights or wanted.precision == "fp32" or asked != ("all", (), None):
        return None
    from ditforge.export.families import published_models

    return read_kept(source.path / SHIPPED) if source.path in published_models().values() else None


def kept_at(wanted: Wanted) -> Path:
    """The file in the cache for a measurement. Its name is a digest of everything that the measurement depends on."""
    import ditforge.export

    source = Path(ditforge.export.__path__[0])
    code = sorted((str(file.relative_to(source)), file.stat().st_mtime_ns) for file in source.rglob("*.py"))
    libraries = [version(name) for name in ("torch", "diffusers", "transformers")]
    as_fp32 = wanted.precision == "fp32"
    asked = wanted.source
    configurations = [*described(asked.path), *(described(asked.base) if asked.base else ())]
    key: tuple[object, ...] = (
        __version__,
        libraries,
        code,
        configurations,
        asked.random_weights,
        asked.text_encoders,
        as_fp32,
    )
    key += (asked.variant,) if asked.variant else ()
    key += () if asked.text_length is None else (f"text {asked.text_length}",)
    return default_cache() / "footprints" / f"{sha256(repr(key).encode()).hexdigest()}.json"


def described(path: Path) -> list[tuple[object, ...]]:
    """What distinguishes a checkpoint from others.

    For a folder, this is its name, its configurations and the sizes of its weights. For a file, it is its path, size
    and time.
    """
    if path.is_file():
        return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)]
    texts = sorted(file for file in path.rglob("*") if file.suffix in (".json", ".txt", ".model") and file.is_file())
    sizes = sorted(file for file in path.rglob("*.safetensors") if file.is_file())
    digests = [(str(file.relative_to(path)), sha256(file.read_bytes()).hexdigest()) for file in texts]
    return [(path.resolve().name,), *digests, *((str(file.relative_to(path)), file.stat().st_size) for file in sizes)]


def read_kept(file: Path) -> Measurement | None:
    """The measurement of an earlier run, or None if there is none that can be read."""
    try:
        return Measurement.model_validate_json(small_files.read_bytes(file))
    except (OSError, ValidationError):
        return None


def keep(found: Measurement, file: Path) -> None:
    """Keep the measurement for the next run. If that fails, the next run measures again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with small_files.written_whole(file) as temporary:
            temporary.write_text(found.model_dump_json())
    except (OSError, UserError) as error:
        log.info("the measurement is not kept: %s", error)


def check_size(model: Model, size: int | None) -> None:
    """Raise UserError if the model cannot make pictures of that many pixels."""
    if size is not None and not model.size_multiple <= size <= model.max_size:
        problem = f"{model.name} makes pictures of {model.size_multiple} to {model.max_size} pixels, got {size}"
        raise UserError(problem, f"--size {model.default_size:d}")


def exported(folder: Path, wanted: Wanted) -> Subject:
    """The networks of an export. Raises UserError if another precision is asked for, or if it has no measurements."""
    found = manifest.read(folder, "onnx")
    if wanted.precision is not None:
        raise UserError(f"{folder} is exported already, in a precision of its own", "leave out --precision")
    parts = memory_plan.parts_of(found.components)
    if parts is None:
        fix = "ditforge export CHECKPOINT --out DIR   again, with this version"
        raise UserError(f"{folder} does not say what its networks take of memory", fix)
    check_size(found.model, wanted.size)
    return Subject(found.model, {}, parts)


def measured(checkpoint: Checkpoint, wanted: Wanted) -> Measurement:
    """The footprints of a checkpoint's networks, in all precisions that may be asked for."""
    from ditforge.export.families import read_networks
    from ditforge.export.graph.measure_footprint import measure, runs
    from ditforge.export.quantisation.precision import EIGHT_BIT, Precision

    footprints: dict[str, dict[str, Footprint]] = {}
    precision = Precision("fp32" if wanted.precision == "fp32" else "bf16")  # fp16 takes as much memory as bf16
    model, _, networks = read_networks(checkpoint, precision)
    check_size(model, wanted.size)
    with terminal.progress("plan") as report:
        total, done = sum(len(runs(network, model)) for network in networks), 0
        for network in networks:

            def step(name: str = network.name) -> None:
                nonlocal done
                done += 1
                report(name, done, total)

            found = measure(network, model, step)
            eight_bit = {scheme: found.footprint(scheme) for scheme in EIGHT_BIT if network.linears}
            footprints[network.name] = {"plain": found.footprint(), **eight_bit}
    return Measurement(model=model, footprints=footprints)
