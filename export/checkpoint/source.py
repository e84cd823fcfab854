"""A checkpoint put together: one file, a diffusers folder for what the file lacks, and LoRAs on top."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint import hub
from ditforge.export.checkpoint.diffusers_folder import INDEX, Checkpoint, open_checkpoint, read_json, t5_parts

Loras = Sequence[tuple[Path, float]]
TEXT_ENCODERS = ("all", "clip")
CONFIG = "config.json"
SCHEDULER = "scheduler", "scheduler_config.json"


def open_source(
    path: Path, base: Path | None = None, loras: Loras = (), text_encoders: str = TEXT_ENCODERS[0]
) -> Checkpoint:
    """Open the diffusers folder `path`, or the single file `path` with what it lacks from the folder `base`.

    `loras` are files and strengths; `text_encoders` "clip" leaves T5 out, whose files may be missing then. No weight is
    read. What is on the Hub is downloaded (hub.py). Raises UserError if something is missing, or does not fit.
    """
    path, base, loras = hub.localised(path, base, loras, text_encoders)
    if path.is_file():
        checkpoint = _open_file(path, base, text_encoders)
    elif base is not None:
        raise UserError(f"--base is for a checkpoint in one file, and {path} is none", "leave out --base")
    else:
        checkpoint = with_text_encoders(replace(open_checkpoint(path), title=hub.title(path)), text_encoders)
    checkpoint = replace(checkpoint, repositories=repositories(path, base, loras))
    return _with_loras(checkpoint, loras) if loras else checkpoint


@contextmanager
def opened(path: Path, base: Path | None, loras: Loras, text_encoders: str, random: bool) -> Iterator[Checkpoint]:
    """The checkpoint as open_source() makes it, or one with random weights, whose `path` may be a name.

    Raises UserError where that cannot be, and where random weights were to be put together with files.
    """
    if not random:
        yield open_source(path, base, loras, text_encoders)
        return
    if base or loras:
        flags = "--base and --lora" if loras else "--base"
        raise UserError("random weights take nothing from files", f"leave out {flags}, or --random-weights")
    from ditforge.export.checkpoint.random_weights import random_checkpoint  # which needs torch

    with random_checkpoint(hub.local(path, hub.Wanted(text_encoders, weights=False))) as checkpoint:
        yield with_text_encoders(checkpoint, text_encoders)


def with_text_encoders(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """The same with all its text encoders, or, for "clip", as if it had come without T5: its index names none.

    Raises UserError for another name.
    """
    if name not in TEXT_ENCODERS:
        raise UserError(f"unknown text encoders {name!r}", f"--text-encoders {' or '.join(TEXT_ENCODERS)}")
    if name == "all":
        return checkpoint
    return replace(checkpoint, configs={**checkpoint.configs, ("", INDEX): _without_t5(checkpoint.config("", INDEX))})


def _without_t5(index: dict[str, Any]) -> dict[str, Any]:
    """An index with null for T5 and its tokenizer, as diffusers writes what was left out."""
    return index | {name: [None, None] for name in t5_parts(index)}


def parse_lora(option: str) -> tuple[Path, float]:
    """`FILE:0.8` as file and strength; `FILE` alone has strength 1. Raises UserError for a strength that is none."""
    path, colon, strength = option.rpartition(":")
    if not colon or Path(option).is_file():
        return Path(option), 1.0
    try:
        number = float(strength)
    except ValueError:
        number = float("nan")
    if not path or not isfinite(number):
        raise UserError(f"{option!r} is not FILE:STRENGTH", "--lora style.safetensors:0.8")
    return Path(path), number


def fingerprint(path: Path, base: Path | None = None, loras: Loras = ()) -> str:
    """A digest of the files by name, size and time of change, which tells whether they are still the same."""
    listed: list[tuple[object, ...]] = [*_files(path), *(_files(base) if base else ())]
    listed += [(*entry, strength) for lora, strength in loras for entry in _files(lora)]
    return sha256(repr(listed).encode()).hexdigest()


def repositories(path: Path, base: Path | None = None, loras: Loras = ()) -> str:
    """Which of them are from the Hub, each with its commit, for people to read; empty where none is."""
    parts = {"": path, "base ": base, **{f"LoRA {number} ": lora for number, (lora, _) in enumerate(loras, 1)}}
    found = {name: hub.snapshot_of(part) for name, part in parts.items() if part is not None}
    return ", ".join(f"{name}{snapshot}" for name, snapshot in found.items() if snapshot)


def _files(path: Path) -> list[tuple[object, ...]]:
    if snapshot := hub.snapshot_of(path):  # what a commit is never changes, and files come to it as they are needed
        return [(str(snapshot),)]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    start = path.parent if path.is_file() else path
    return [(str(file.relative_to(start)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _open_file(file: Path, base: Path | None, text_encoders: str) -> Checkpoint:
    from ditforge.export.checkpoint.layouts import open_single_file, require

    single = open_single_file(file)
    opened = with_text_encoders(open_checkpoint(base), text_encoders) if base else None
    if opened is None and single.published is None:
        held = ", ".join(single.components)
        raise UserError(f"{file} holds no DiT, only {held}", "--base FOLDER, a diffusers folder with the rest")
    if opened and single.pipeline not in (None, opened.pipeline):
        problem = f"{file} is of a {single.pipeline}, and {base} is a {opened.pipeline}"
        raise UserError(problem, "--base FOLDER, a diffusers folder of the same family")
    folder = base or single.published
    assert folder is not None, "one of them is there"
    index = opened.config("", INDEX) if opened else read_json(folder / INDEX)
    require(single, (name for name in _components(index) if name != SCHEDULER[0]), base)
    assert opened is not None, "the tokenizers are in no single file"
    configs = dict(opened.configs)
    if single.published:
        names = [SCHEDULER, *((component, CONFIG) for component in single.components)]
        for component, name in names:
            if not (folder / component / name).is_file():
                configs[component, name] = read_json(single.published / component / name)
        known = folder / "transformer" / CONFIG
        base_config = read_json(known) if known.is_file() else None
        configs["transformer", CONFIG] = single.transformer_config(base_config)
    return replace(opened, title=file.stem, tensors=single.components, configs=configs)


def _with_loras(checkpoint: Checkpoint, loras: Loras) -> Checkpoint:
    from ditforge.export.checkpoint.lazy_tensors import folder_tensors
    from ditforge.export.checkpoint.lora import fuse

    tensors = dict(checkpoint.tensors)
    for component in _components(checkpoint.config("", INDEX)):
        if component.startswith(("transformer", "text_encoder")) and component not in tensors:
            tensors[component] = folder_tensors(checkpoint.weights(component))
    fused = fuse({name: part for name, part in tensors.items() if name != "vae"}, loras)
    names = tuple(f"{file.name}:{strength:g}" for file, strength in loras)
    return replace(checkpoint, tensors={**tensors, **fused}, loras=names)


def _components(index: dict[str, Any]) -> list[str]:
    """What an index names that has files: a class, and not null where something was left out."""
    return [name for name, value in index.items() if isinstance(value, list) and value and value[-1]]
