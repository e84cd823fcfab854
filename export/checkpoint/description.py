"""What a file of tensors is, from its header alone: for `ditforge inspect`. Nothing here reads a weight.

PyTorch is imported only for adapters, whose modules are compared with those of the published models.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.description import AdapterDescription, describe_adapter
from ditforge.export.checkpoint.adapters.keys import check_kind, is_adapter
from ditforge.export.checkpoint.architectures import architecture_of, encoder_of, gguf_name
from ditforge.export.checkpoint.diffusers_folder import CONFIGS, INDEX, named_components, read_json
from ditforge.export.checkpoint.gguf_header import is_gguf, read_gguf_header
from ditforge.export.checkpoint.hub import name_of
from ditforge.export.checkpoint.layout import (
    UNUSED,
    VAE_PARTS,
    VAE_PREFIXES,
    Config,
    Layout,
    encoder_keys,
    find_vae,
    known_models,
    layouts,
)
from ditforge.export.checkpoint.load_report import LoadReport, shown
from ditforge.export.checkpoint.refused_formats import check_shard
from ditforge.export.checkpoint.variants import Evidence, Variant, choose, names_in, titles
from ditforge.export.checkpoint.weights import read_header, read_metadata
from ditforge.option import command

BITS = re.compile(r"(?:F|BF|I|U|BOOL)(\d*)")
GGUF_T5 = ("t5", "t5encoder")
MARKS = re.compile(r"(.*\.)?(scaled_fp8|comfy_quant)")  # what tells ComfyUI how weights are stored


@dataclass(frozen=True)
class Entry:
    """A tensor in a header: its type as the format names it, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class FilePart:
    """A component in a file.

    name: the folder that diffusers has for it; where the family is open, what ComfyUI calls it.
    tensors, parameters: the number of tensors, and the number of all their elements.
    dtypes: the bytes of each dtype.
    """

    name: str
    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class AdapterFit:
    """How an adapter fits a published model.

    matched: how many of its modules fit. lacking: those that the model can do without. unmatched: those whose name fits
    no module. misfits: those of another shape. nearest: for unmatched modules, the module most like them.
    """

    model: str
    matched: int
    lacking: tuple[str, ...]
    unmatched: tuple[str, ...]
    misfits: tuple[str, ...]
    nearest: dict[str, str]


@dataclass(frozen=True)
class Adapter:
    """What a LoRA or another adapter is.

    kinds: how many modules have each kind. ranks, alphas: how many have each rank, and each alpha that is written.
    tool: whose names the modules have. network: the models whose modules are called so. modules: their number by
    component. strange: keys of no known form. fits: the published models, the best fit first.
    """

    kinds: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    tool: str
    network: str
    modules: dict[str, int]
    strange: tuple[str, ...]
    fits: tuple[AdapterFit, ...]


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors.

    kind: checkpoint file, adapter or tensors.
    format: safetensors or GGUF.
    what: in words, what it is.
    family, variant: the titles of its model's family, and of the model; empty if they are not known.
    layout: how the names of the DiT's tensors are written; empty if it has no DiT.
    size: its bytes. tensors, parameters, dtypes: as in a part.
    parts: the components in it.
    adapter: what the adapter is, or null.
    metadata: the texts in its header.
    ignored: what an export does not read, and why.
    export: the command that exports it, or empty if none does.
    problem, fix: why it cannot be exported as it is, and what to do; empty if it can.
    """

    kind: str
    path: str
    format: str
    what: str
    family: str
    variant: str
    layout: str
    size: int
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    parts: tuple[FilePart, ...]
    adapter: Adapter | None
    metadata: dict[str, str]
    ignored: tuple[str, ...]
    export: str
    problem: str
    fix: str


def describe_file(file: Path) -> TensorFile:
    """Describe the file. Raises UserError if it is damaged, or of a format that is named and cannot be read."""
    entries, metadata, architecture = read_entries(file)
    whole = part("", entries.values())
    plain = TensorFile(
        kind="tensors",
        path=str(file),
        format="GGUF" if is_gguf(file) else "safetensors",
        what="tensors of no known model",
        family="",
        variant="",
        layout="",
        size=file.stat().st_size,
        tensors=whole.tensors,
        parameters=whole.parameters,
        dtypes=whole.dtypes,
        parts=(),
        adapter=None,
        metadata=metadata,
        ignored=(),
        export="",
        problem="",
        fix="",
    )
    if is_adapter(entries):
        return as_adapter(file, plain)
    try:
        check_shard(file)
    except UserError as error:
        what = error.problem.removeprefix(f"{file} is ")
        return replace(plain, what=what, problem=f"it is {what}", fix=str(error.fix))
    if name := architecture_of({key: entry.shape for key, entry in entries.items()}):
        return of_another_architecture(plain, name)
    found = next(((one, *where) for one in layouts() if (where := one.find(entries))), None)
    described = as_checkpoint(file, plain, entries, found, architecture)
    if not described.parts and (name := gguf_name(architecture)):
        return of_another_architecture(plain, name)
    return described


def of_another_architecture(plain: TensorFile, name: str) -> TensorFile:
    """Describe a file with a model that is known and cannot be exported."""
    problem, fix = f"it is {name}, which cannot be exported", f"use {known_models()}, or a fine-tune of them"
    return replace(plain, what=f"a model of another architecture: {name}", problem=problem, fix=fix)


def read_entries(file: Path) -> tuple[dict[str, Entry], dict[str, str], str]:
    """Return the tensors in the header by name, its texts, and what a GGUF file says of its architecture."""
    if not is_gguf(file):
        stored = read_header(file)
        entries = {name: Entry(one.dtype, one.shape, size_of(one.dtype, one.shape)) for name, one in stored.items()}
        return entries, read_metadata(file), ""
    header = read_gguf_header(file)
    tensors = {
        name: Entry(one.kind, one.shape, prod(one.shape) // one.block * one.item)
        for name, one in header.tensors.items()
    }
    texts = {name: value for name, value in header.metadata.items() if isinstance(value, str)}
    return tensors, texts, header.architecture


def size_of(dtype: str, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor whose dtype has safetensors' name: F8_E4M3, BF16, …"""
    match = BITS.match(dtype)
    assert match, dtype
    return prod(shape) * int(match[1] or 8) // 8


def part(name: str, entries: Iterable[Entry]) -> FilePart:
    """Count the tensors of a component."""
    entries, dtypes = list(entries), Counter[str]()
    for entry in entries:
        dtypes[entry.dtype] += entry.size
    return FilePart(name, len(entries), sum(prod(entry.shape) for entry in entries), dict(dtypes.most_common()))


def as_checkpoint(
    file: Path,
    plain: TensorFile,
    entries: Mapping[str, Entry],
    found: tuple[Layout, str, bool] | None,
    architecture: str,
) -> TensorFile:
    """Describe a file that is no adapter: a checkpoint in one file, or one component alone."""
    held, used = dict[str, list[str]](), set[str]()
    layout, prefix, own = found or (None, "", False)
    if layout:
        others = ("text_encoders.", *filter(None, VAE_PREFIXES)) if not prefix else ()
        held["transformer"] = [key for key in entries if key.startswith(prefix) and not key.startswith(others)]
    for name in {key.split(".")[1] for key in entries if key.startswith("text_encoders.")}:
        folder = layout.encoders.get(name, name) if layout else name
        held[folder] = list(encoder_keys(name, entries).values())
    if alone := "t5xxl" if architecture in GGUF_T5 else encoder_of(entries):
        held[alone] = list(entries)
    vae = find_vae(entries)
    if vae is not None:
        held["vae"] = [key for key in entries if key.startswith(tuple(vae + start for start in VAE_PARTS))]
    used.update(key for keys in held.values() for key in keys)
    parts = tuple(part(name, (entries[key] for key in keys)) for name, keys in sorted(held.items()) if keys)
    if not parts:
        return unknown(file, plain, list(entries))
    ignored = left_out([key for key in entries if key not in used])
    described = replace(plain, kind="checkpoint file", parts=parts, ignored=ignored)
    if layout:
        dit = {key[len(prefix) :]: entries[key] for key in held["transformer"]}
        return with_dit(file, described, (layout, prefix, own), dit)
    names = " and ".join(one.name for one in parts)
    to_export = command("ditforge export {} --base FOLDER --out DIR", file)
    return replace(described, what=f"{names} of a model, without its DiT", export=str(to_export))


def with_dit(
    file: Path, described: TensorFile, found: tuple[Layout, str, bool], dit: Mapping[str, Entry]
) -> TensorFile:
    """Add what the DiT's tensors tell: the model, and what an export of the file lacks.

    `dit` has the DiT's tensors without the prefix.
    """
    layout, prefix, own = found
    names = "diffusers' names" if own else "the authors' names"
    written = f"{names}, after {prefix}" if prefix else names
    described = replace(
        described, family=layout.title, layout=written, what=f"a checkpoint of {layout.title} in one file"
    )
    try:
        config = layout.own_config(dit) if own else layout.config(dit)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        problem = f"its DiT is incomplete or built otherwise: {error}"
        return replace(described, problem=problem, fix="download the file again, or use another")
    fitting = [variant for variant in layout.variants if variant.fits(config)]
    if problem := "" if own else unlike(dit, layout.names(config)):
        fix = f"download the file again; if it stays so, use {layout.title}, or a fine-tune of it"
        return replace(described, variant=titles(fitting), problem=problem, fix=fix)
    try:
        known = choose(layout.variants, evidence(file, config, described.metadata), LoadReport())
    except UserError as error:
        return replace(described, variant=titles(fitting), problem=error.problem, fix=str(error.fix))
    missing = missing_components(known, [one.name for one in described.parts])
    usage = "ditforge export {} --base FOLDER --out DIR" if missing else "ditforge export {} --out DIR"
    to_export = command(usage, file)
    lacks = f"; FOLDER is a diffusers folder with {', '.join(missing)}" if missing else ""
    return replace(
        described, what=f"a checkpoint of {known.title} in one file", variant=known.title, export=f"{to_export}{lacks}"
    )


def unlike(dit: Iterable[str], names: Iterable[str]) -> str:
    """Return what a DiT's tensors lack of the names, or have beside them and their scales; "" if there is nothing."""
    dit, names = set(dit), set(names)
    lacking = [name for name in sorted(names) if name not in dit and f"{name}_packed" not in dit]
    if lacking:
        return f"its DiT lacks {shown(lacking)}"
    modules = {name.rpartition(".")[0] for name in names}
    strange = [name for name in sorted(dit - names) if name.rpartition(".")[0] not in modules - {""}]
    strange = [name for name in strange if not MARKS.fullmatch(name)]
    return f"its DiT has {shown(strange)}, which no such model has" if strange else ""


def evidence(file: Path, config: Config, metadata: Mapping[str, str]) -> Evidence:
    """Return what the file says of its model."""
    return Evidence(file, config, names=[("the Hub", name_of(file)), *names_in(metadata)])


def missing_components(variant: Variant, held: Iterable[str]) -> list[str]:
    """Return the components of the published model that the file does not hold, tokenizers included."""
    index: dict[str, Any] = read_json(CONFIGS / variant.configs / INDEX)
    return [name for name in named_components(index) if name not in set(held) | {"scheduler"}]


def left_out(keys: Iterable[str]) -> tuple[str, ...]:
    """Return what an export does not read of the keys, and why."""
    found: dict[str, list[str]] = {}
    for key in keys:
        if MARKS.fullmatch(key):
            continue
        reason = next((reason for pattern, reason in UNUSED.items() if pattern.fullmatch(key)), "")
        found.setdefault(reason or "no component of a known model has such tensors", []).append(key)
    return tuple(f"{shown(those)}: {reason}" for reason, those in found.items())


def unknown(file: Path, plain: TensorFile, names: list[str]) -> TensorFile:
    """Add what the file is, the problem and the fix, where no component is known."""
    try:
        check_kind(file, names)
    except UserError as error:
        problem = error.problem.removeprefix(f"{file} is ")
        what, fix = problem.partition(": it holds ")[0], str(error.fix)
        return replace(plain, kind="adapter", what=what, problem=f"it is {problem}", fix=fix)
    problem = f"it has the tensors {shown(names)}, which no known model has" if names else "it has no tensors"
    fix = f"use a file of {known_models()}, in its authors' layout or ComfyUI's"
    return replace(plain, problem=problem, fix=fix)


def as_adapter(file: Path, plain: TensorFile) -> TensorFile:
    """Describe a LoRA or another adapter."""
    what = "an adapter of a checkpoint"
    try:
        found = describe_adapter(file)
    except UserError as error:
        problem = error.problem.removeprefix(f"{file} is ").removeprefix(f"{file}: ")
        return replace(plain, kind="adapter", what=what, problem=problem, fix=str(error.fix))
    fits = adapter_fits(file)
    kinds = " and ".join(found.kinds)
    described = replace(
        plain,
        kind="adapter",
        what=f"an adapter ({kinds}) for {found.network}",
        adapter=adapter_facts(found, fits),
        export=str(command("ditforge export CHECKPOINT --lora {} --out DIR", f"{file}:1.0")),
    )
    if any(fit.matched and not fit.unmatched and not fit.misfits for fit in fits):
        return described
    problem = "it fits none of the published models whole, by names and shapes"
    return replace(described, problem=problem, fix="use it with the model that it was made for, if that is another")


def adapter_fits(file: Path) -> tuple[AdapterFit, ...]:
    """Compare the adapter with the published models. PyTorch is imported for it."""
    from ditforge.export.checkpoint.adapters.fitting import fits

    return tuple(
        AdapterFit(fit.model, fit.matched, fit.lacking, fit.unmatched, fit.misfits, dict(fit.nearest))
        for fit in fits(file)
    )


def adapter_facts(found: AdapterDescription, fits: tuple[AdapterFit, ...]) -> Adapter:
    """Return what is reported of an adapter."""
    return Adapter(
        kinds=dict(found.kinds),
        ranks={str(rank): count for rank, count in found.ranks.items()},
        alphas={f"{alpha:g}": count for alpha, count in found.alphas.items()},
        tool=found.spelling,
        network=found.network,
        modules=dict(found.components),
        strange=found.strange,
        fits=fits,
    )
