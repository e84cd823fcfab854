"""Choose among the files in a component's folder those that hold its weights: one file, or shards; and which variant.

A folder may hold the weights several times: in one file and in shards, in several variants such as fp16, by the names
of diffusers and of transformers. The names are those that both libraries write (diffusers: utils/hub_utils.py and
pipelines/pipeline_loading_utils.py, transformers: modeling_utils.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from ditforge.errors import UserError
from ditforge.export.checkpoint.load_report import LoadReport, shown
from ditforge.option import setting

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
SUFFIX = ".safetensors"
NAME = rf"(?P<stem>{DIFFUSERS}|{TRANSFORMERS})"
VARIANT = r"[A-Za-z0-9][A-Za-z0-9_-]*?"
SHARD = r"-(?P<number>\d{5})-of-(?P<total>\d{5})"
# `model.fp16-00001-of-00002.safetensors`, and as diffusers wrote it before, `model-00001-of-00002.fp16.safetensors`.
WEIGHTS = re.compile(rf"{NAME}(?:\.(?P<variant>{VARIANT}))?(?:{SHARD}(?:\.(?P<older>{VARIANT}))?)?\{SUFFIX}")
# `model.safetensors.index.fp16.json`, and older: `model.safetensors.fp16.index.json`.
INDEX = re.compile(
    rf"{NAME}(?:\.(?P<variant>{VARIANT}))?\{SUFFIX}(?:\.(?P<older>{VARIANT}))?\.index(?:\.(?P<newer>{VARIANT}))?\.json"
)

ReadIndex = Callable[[str], Collection[str]]


@dataclass
class Set:
    """The files of one network in one variant (None: in none), by the names of diffusers or of transformers.

    shards: the files that are numbered as parts of so many files, by that number of files.
    """

    stem: str
    variant: str | None
    single: str | None = None
    indices: list[str] = field(default_factory=list)
    shards: dict[int, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """The files to read, and their index, if there is one. `files` are in order."""

    files: tuple[str, ...]
    index: str | None = None


def indices(names: Iterable[str], asked: Collection[str]) -> list[str]:
    """Return the indices among the names of a folder's files that may be read if the variants `asked` are asked for."""
    sets = file_sets(names)
    chosen = [files for files in sets if files.variant in asked] or [files for files in sets if files.variant is None]
    return [index for files in chosen or sets for index in files.indices]


def file_sets(names: Iterable[str]) -> list[Set]:
    """Return the sets of weights among the names of the files of a folder."""
    found: dict[tuple[str, str | None], Set] = {}
    for name in sorted(names):
        weights, index = WEIGHTS.fullmatch(name), INDEX.fullmatch(name)
        match = weights or index
        if match is None:
            continue
        parts = match.groupdict()
        variant = parts["variant"] or parts["older"] or parts.get("newer")
        files = found.setdefault((parts["stem"], variant), Set(parts["stem"], variant))
        if index:
            files.indices.append(name)
        elif parts["total"]:
            files.shards.setdefault(int(parts["total"]), []).append(name)
        else:
            files.single = name
    return list(found.values())


def variants(names: Iterable[str]) -> list[str]:
    """Return the variants of the weights among the names of the files of a folder."""
    return sorted({files.variant for files in file_sets(names) if files.variant})


def choose(
    where: str, names: Collection[str], read_index: ReadIndex, report: LoadReport, again: str = "copy the folder again"
) -> Chosen | None:
    """Choose the files with the weights among `names`, the files of the folder `where`; None if none has weights.

    `read_index` returns the names of the shards in an index, and `again` is what to do about a missing file. What is
    there and not chosen is added to `report`, which also knows which variant the user asks for. Raises UserError if a
    shard is missing, or if it is open which variant is meant.
    """
    sets = file_sets(names)
    if not sets:
        return None
    if strange := sorted(name for name in names if name.endswith(SUFFIX) and not WEIGHTS.fullmatch(name)):
        report.add(f"{shown(strange)} in {where}", "weights in files of such names are not read, by diffusers neither")
    first = TRANSFORMERS if where.rstrip("/").rpartition("/")[2].startswith("text_encoder") else DIFFUSERS
    sets.sort(key=lambda files: files.stem != first)
    known = sorted({files.variant for files in sets if files.variant})
    asked = report.choose(known)
    plain = [files for files in sets if files.variant is None and _has_weights(files)]
    if asked is not None:
        taken = next(files for files in sets if files.variant == asked)
    elif plain:
        taken = plain[0]
    elif len(known) == 1:
        taken = next(files for files in sets if files.variant == known[0])
        report.add(f"{where} has its weights only in the variant {known[0]}", "they are read", expected=True)
    elif known:
        fix = ", or ".join(str(setting("variant", name)) for name in known)
        raise UserError(f"{where} has its weights in the variants {', '.join(known)}, and none without a name", fix)
    else:
        taken = sets[0]
    if ignored := [files for files in plain if files.stem != taken.stem and asked is None]:
        others = _listed(ignored)
        report.add(f"{where}/{others[0]}", f"a {taken.stem}{SUFFIX} is there too, which is what is read")
    return _of_one_set(where, names, taken, read_index, report, again)


def _of_one_set(
    where: str, names: Collection[str], files: Set, read_index: ReadIndex, report: LoadReport, again: str
) -> Chosen:
    """Choose between a single file, shards with an index, and shards without one."""
    reasons = []
    for index in files.indices:
        shards = sorted(set(read_index(index)))
        missing = [shard for shard in shards if shard not in names]
        if shards and not missing:
            stale = [name for name in _listed([files]) if name not in (*shards, index)]
            if stale:
                report.add(
                    f"{', '.join(stale[:3])} in {where}",
                    f"{index} names other files, which are read; delete what is out of date",
                )
            return Chosen(tuple(shards), index)
        reasons.append((index, shards, missing))
    if files.single and all(len(missing) == len(shards) for _, shards, missing in reasons):
        for index, _, _ in reasons:
            report.add(f"{index} in {where}", f"none of the files that it names is there, so {files.single} is read")
        if numbered := [name for shards in files.shards.values() for name in shards]:
            report.add(f"{shown(numbered)} in {where}", f"no index names them, so {files.single} is read")
        return Chosen((files.single,))
    if reasons:
        index, shards, missing = reasons[0]
        fix = again
        if files.single:
            fix += f", or delete {index} and the other shards, for {files.single} to be read"
        problem = f"{where}/{missing[0]} is missing: {index} names it ({len(missing)} of {len(shards)} files)"
        raise UserError(problem, fix)
    totals = sorted(files.shards)
    if len(totals) > 1:
        seen = " and ".join(f"of {total}" for total in totals)
        raise UserError(f"{where} has shards {seen}, and no index that says which are meant", again)
    total, shards = totals[0], files.shards[totals[0]]
    if len(shards) != total:
        raise UserError(f"{where} has {len(shards)} of {total} shards, and no index", again)
    report.add(f"{where} has no index of its {total} shards", "all of them are there, and are read", expected=True)
    return Chosen(tuple(shards))


def _has_weights(files: Set) -> bool:
    return bool(files.single or files.shards or files.indices)


def _listed(sets: Iterable[Set]) -> list[str]:
    """Return the names of the files of the sets."""
    found: list[str] = []
    for files in sets:
        found += [files.single] if files.single else []
        found += files.indices
        found += [name for shards in files.shards.values() for name in shards]
    return found
