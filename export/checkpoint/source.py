"""Put a checkpoint together from a single file, a diffusers folder with what the file lacks, and LoRAs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditforge.errors import UserError
from ditforge.export.checkpoint import hub
from ditforge.export.checkpoint.adapters.folder import adapter_file, name_of
from ditforge.export.checkpoint.adapters.settings import CONFIG as ADAPTER_CONFIG
from ditforge.export.checkpoint.diffusers_folder import (
    CONFIG,
    INDEX,
    SCHEDULER,
    Checkpoint,
    components_in,
    elsewhere,
    named_components,
    open_checkpoint,
    read_json,
    report_files,
    t5_parts,
)
from ditforge.export.checkpoint.folder_settings import FolderSettings, check_text_length
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.variants import Evidence, choose, evidence_of
from ditforge.option import option, setting

if TYPE_CHECKING:
    from ditforge.export.checkpoint.layouts import SingleFile
    from ditforge.export.checkpoint.variants import Variant
    from ditforge.export.families import Family

TEXT_ENCODER_CHOICES = ("all", "clip")


@dataclass(frozen=True)
class CheckpointSource:
    """What a checkpoint is put together from.

    path: a folder in diffusers' layout, or a .safetensors file, or with a base a folder with only some networks, such
        as `transformer`. It can be on the Hugging Face Hub (see hub.py), as OWNER/NAME or OWNER/NAME/FILE.safetensors,
        and so can the base and the LoRAs. With `random_weights`, it can also be the name of a published model, such as
        "flux.1-dev".
    base: a folder in diffusers' layout with the components that `path` lacks, for example the tokenizers.
    loras: LoRAs and other adapters, each with the strength at which it is merged into the weights: a file, or a folder
        with one, such as PEFT writes.
    text_encoders: "all", or "clip" to leave T5 out. With "clip", T5's files may be missing.
    t5_precision: the precision of T5; None if it is that of the rest.
    random_weights: read only the configurations, and use random numbers as weights.
    strict: raise an error, in place of warnings, if a part of the files has no effect on the export.
    variant: which of several variants is meant, where files or configurations leave it open: of files, such as "fp16",
        or of a model, such as "dev".
    text_length: the number of tokens of T5's input; None if it is that of the model.
    """

    path: Path
    base: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    text_encoders: str = TEXT_ENCODER_CHOICES[0]
    t5_precision: str | None = None
    random_weights: bool = False
    strict: bool = False
    variant: tuple[str, ...] = ()
    text_length: int | None = None


@contextmanager
def opened(source: CheckpointSource) -> Iterator[Checkpoint]:
    """Open the checkpoint without reading any weight.

    Raises UserError if something is missing, or if the parts do not fit each other.
    """
    if not source.random_weights:
        yield open_files(source)
        return
    if source.base or source.loras:
        files = f"{option('base')} and {option('loras', '--lora')}" if source.loras else option("base")
        raise UserError("random weights take nothing from files", f"leave out {files}, or {option('random_weights')}")
    from ditforge.export.checkpoint.random_weights import random_checkpoint  # imported late, because it imports torch

    check_text_length(source.text_length)
    here = hub.local(source.path, hub.Wanted(source.text_encoders, weights=False))
    with random_checkpoint(here) as checkpoint:
        named = replace(
            checkpoint,
            variant=source.variant,
            text_length=source.text_length,
            repository=hub.name_of(here),
            report=LoadReport(source.strict, source.variant),
        )
        yield with_text_encoders(named, source.text_encoders)


def open_files(source: CheckpointSource) -> Checkpoint:
    """Open a checkpoint whose weights are in files. Raises UserError in the same cases as opened()."""
    source, report = localised(source), LoadReport(source.strict, source.variant)
    check_text_length(source.text_length)
    if source.path.is_file() or (source.base and _is_partial(source.path)):
        checkpoint = _open_parts(source, report)
    elif source.base is not None and source.path.is_dir() and not (source.path / INDEX).is_file():
        problem = f"{source.path} has no {INDEX}, and no networks that {option('base')} could complete"
        raise UserError(problem, elsewhere(source.path))
    elif source.base is not None:
        raise UserError(
            f"{option('base')} is for a checkpoint in one file or with some networks alone, and {source.path} is none",
            f"leave out {option('base')}",
        )
    else:
        named = replace(open_checkpoint(source.path), title=hub.title(source.path), report=report)
        named = replace(named, repository=hub.name_of(source.path))
        report_files(source.path, report)
        checkpoint = with_text_encoders(named, source.text_encoders)
    checkpoint = replace(
        checkpoint, variant=source.variant, text_length=source.text_length, repositories=repositories(source)
    )
    for lora, strength in source.loras:
        if not strength:
            report.add(str(lora), "its strength is 0, so it changes nothing")
    return _with_loras(checkpoint, source.loras) if source.loras else checkpoint


def localised(source: CheckpointSource, weights: bool = True, progress: hub.Progress | None = None) -> CheckpointSource:
    """Download what is on the Hub, and return the source with local paths only.

    The weights of `base` that the single file `path` already has are not downloaded. With `weights` False, only the
    configurations and tokenizers of a folder are downloaded. `progress` is called with (component or file, bytes
    downloaded, bytes in all). Raises the same errors as hub.local().
    """
    path = hub.local(source.path, hub.Wanted(source.text_encoders, weights, variant=source.variant), progress)
    base = source.base
    if base is not None and hub.reference_of(base):
        base = hub.local(
            base, hub.Wanted(source.text_encoders, weights, hub.held_components(path), source.variant), progress
        )
    loras = tuple((adapter_file(hub.local_lora(lora, progress)), strength) for lora, strength in source.loras)
    return replace(source, path=path, base=base, loras=loras)


def with_text_encoders(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """Return the checkpoint with the text encoders that `name` chooses.

    "all" returns it unchanged. "clip" returns it without T5: its model_index.json then names no T5 and no tokenizer of
    T5. Raises UserError for any other name.
    """
    if name not in TEXT_ENCODER_CHOICES:
        raise UserError(
            f"unknown text encoders {name!r}",
            f"{option('text_encoders')} with one of: {', '.join(TEXT_ENCODER_CHOICES)}",
        )
    if name == "all":
        return checkpoint
    index = checkpoint.config("", INDEX)
    if not t5_parts(index):
        reason = f"{checkpoint.folder} comes without T5, so it changes nothing"
        checkpoint.report.add(setting("text_encoders", name), reason)
    return replace(checkpoint, configs={**checkpoint.configs, ("", INDEX): _without_t5(index)})


def _without_t5(index: dict[str, Any]) -> dict[str, Any]:
    """Return the index with null for T5 and its tokenizer, which is how diffusers marks components left out."""
    return index | {name: [None, None] for name in t5_parts(index)}


def parse_lora(text: str) -> tuple[Path, float]:
    """Split `FILE:0.8` into file and strength. The strength of `FILE` alone is 1.

    Raises UserError if there is no file, or if the strength is not a finite number.
    """
    path, colon, strength = text.rpartition(":")
    if text and (not colon or Path(text).exists()):
        return Path(text), 1.0
    try:
        number = float(strength)
    except ValueError:
        number = float("nan")
    if not path or not isfinite(number):
        raise UserError(
            f"{text!r} is not FILE:STRENGTH",
            option('loras=[("style.safetensors", 0.8)]', "--lora style.safetensors:0.8"),
        )
    return Path(path), number


def fingerprint(source: CheckpointSource) -> str:
    """Return a digest of the names, sizes and modification times of the files: it changes when a file changes.

    A part from the Hub counts with its repository and commit instead, and each LoRA also with its strength. The
    variants count too.
    """
    listed: list[tuple[object, ...]] = [*_files(source.path), *(_files(source.base) if source.base else ())]
    listed += [(*entry, strength) for lora, strength in source.loras for entry in _files(lora)]
    if source.variant:
        listed.append(("variant", *sorted(source.variant)))
    return sha256(repr(listed).encode()).hexdigest()


def repositories(source: CheckpointSource) -> str:
    """Describe the parts that come from the Hub, each with its commit, for people to read. Empty if none does."""
    loras = {f"LoRA {number} ": lora for number, (lora, _) in enumerate(source.loras, 1)}
    parts = {"": source.path, "base ": source.base, **loras}
    found = {name: hub.snapshot_of(part) for name, part in parts.items() if part is not None}
    return ", ".join(f"{name}{snapshot}" for name, snapshot in found.items() if snapshot)


def _files(path: Path) -> list[tuple[object, ...]]:
    # A commit never changes, so its name is enough. Its files in the cache would not do: more come as they are needed.
    if snapshot := hub.snapshot_of(path):
        return [(str(snapshot),)]
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if path.is_file() and (path.parent / ADAPTER_CONFIG).is_file():  # settings of an adapter that are read beside it
        files.append(path.parent / ADAPTER_CONFIG)
    start = path.parent if path.is_file() else path
    return [(str(file.relative_to(start)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _open_parts(source: CheckpointSource, report: LoadReport) -> Checkpoint:
    """Open a single file, or a folder with some networks, and the base that has the rest."""
    from ditforge.export.checkpoint.layouts import open_folder, open_single_file, require

    path, base, opened = source.path, source.base, None
    if base:
        named = replace(open_checkpoint(base), report=report, repository=hub.name_of(base))
        opened = with_text_encoders(named, source.text_encoders)
    single = open_folder(path, report, opened) if opened and path.is_dir() else open_single_file(path, report, opened)
    if opened is None and single.family is None:
        held = ", ".join(single.components)
        raise UserError(
            f"{path} holds no DiT, only {held}", f"{setting('base', 'FOLDER')}, a diffusers folder with the rest"
        )
    if opened and single.family and single.family.pipeline != opened.pipeline:
        problem = f"{path} is of a {single.family.pipeline}, and {base} is a {opened.pipeline}"
        raise UserError(problem, f"{setting('base', 'FOLDER')}, a diffusers folder of the same family")
    index = opened.config("", INDEX) if opened else next(map(_read_index, _published(single.family)))
    require(single, (name for name in named_components(index) if name != SCHEDULER[0]), base)
    assert opened is not None, "the tokenizers are in no single file"
    completed = replace(
        opened, title=path.stem if path.is_file() else hub.title(path) or path.resolve().name, tensors=single.components
    )
    if single.family is None or "transformer" not in single.components:
        return replace(completed, configs={**opened.configs, **single.configs})
    return _completed(completed, single, single.family, report)


def _completed(opened: Checkpoint, single: SingleFile, family: Family, report: LoadReport) -> Checkpoint:
    """Return the base with the DiT of `single`, its variant, and the configurations that go with it."""
    folder, configs = opened.folder, {**opened.configs, **single.configs}
    known = folder / "transformer" / CONFIG
    base_config = read_json(known) if known.is_file() else None
    of_base = _variant_of_base(opened, family, base_config or single.config, whole=base_config is not None)
    chosen = None
    if family.variants:
        config = family.read_config(Checkpoint(folder, "", configs={("transformer", CONFIG): single.config}))
        chosen = choose(family.variants, Evidence(single.file, config, names=single.names, base=of_base), report)
    published = family.published[chosen.configs] if chosen else next(_published(family))
    for component, name in [SCHEDULER, *((component, CONFIG) for component in single.components)]:
        if (component, name) not in configs and not (folder / component / name).is_file():
            configs[component, name] = read_json(published / component / name)
    settings = opened.settings
    if chosen:
        scheduler = configs.get(SCHEDULER) or read_json(folder.joinpath(*SCHEDULER))
        foreign = chosen.scheduled is not None and not chosen.scheduled(scheduler)
        if foreign or (of_base is not None and of_base != chosen):
            configs[SCHEDULER], settings = read_json(published.joinpath(*SCHEDULER)), FolderSettings()
            whose = f"of {of_base.title}" if of_base else "of another model"
            reason = f"they are {whose}, and {single.file} is {chosen.title}: those of {chosen.configs} are taken"
            report.add(f"the scheduler and the recommended settings in {folder}", reason)
    configs["transformer", CONFIG] = single.transformer_config(published, base_config)
    return replace(opened, configs=configs, chosen=chosen, settings=settings)


def _variant_of_base(opened: Checkpoint, family: Family, config: dict[str, Any], whole: bool) -> Variant | None:
    """Return the variant of a base, whose DiT has the configuration `config`; None if its files leave it open.

    `whole` is False for a base without a DiT: its scheduler may then be that of several variants.
    """
    if not family.variants:
        return None
    base = replace(opened, configs={**opened.configs, ("transformer", CONFIG): config})
    scheduled = whole and (opened.folder.joinpath(*SCHEDULER)).is_file()
    try:
        return choose(family.variants, evidence_of(base, family.read_config(base), scheduled), LoadReport())
    except UserError:
        return None


def _is_partial(path: Path) -> bool:
    return path.is_dir() and not (path / INDEX).is_file() and bool(components_in(path))


def _published(family: Family | None) -> Iterator[Path]:
    return iter(family.published.values() if family else ())


def _read_index(folder: Path) -> dict[str, Any]:
    return read_json(folder / INDEX)


def _with_loras(checkpoint: Checkpoint, loras: Sequence[tuple[Path, float]]) -> Checkpoint:
    from ditforge.export.checkpoint.adapters.fusing import fuse
    from ditforge.export.families import family_of

    tensors = dict(checkpoint.tensors)
    for component in named_components(checkpoint.config("", INDEX)):
        if component.startswith(("transformer", "text_encoder")) and component not in tensors:
            tensors[component] = checkpoint.read_component(component)
    changed = {name: part for name, part in tensors.items() if name != "vae"}
    fused = fuse(changed, loras, family_of(checkpoint).layout, checkpoint.report)
    names = tuple(f"{name_of(file)}:{strength:g}" for file, strength in loras)
    return replace(checkpoint, tensors={**tensors, **fused}, loras=names)
