"""Choose the files of a repository in diffusers' layout that an export reads.

A repository holds much that is not needed: the weights again in a single file, in other formats (.bin, .msgpack, ONNX)
and in other dtypes (fp16), and pictures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.component_files import choose, indices
from ditforge.export.checkpoint.diffusers_folder import named_components, t5_parts
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.weights import OTHER_WEIGHTS, SINGLE_FILES
from ditforge.option import option
from ditforge.small_files import read_bytes

READ = re.compile(r"scheduler|transformer|vae|(text_encoder|tokenizer)(_\d+)?")
WITHOUT_WEIGHTS = re.compile(r"scheduler|tokenizer(_\d+)?")
AGAIN = "take another revision of the repository, or ask its owner for the file"
DESCRIPTIONS = {".json", ".txt", ".model", ".jinja"}  # the suffixes of configurations and vocabularies


def components(index: dict[str, Any], text_encoders: str) -> list[str]:
    """Return the components of a model_index.json that an export reads; T5 only if `text_encoders` is "all".

    `text_encoders` is "all" or "clip". Raises UserError for anything else.
    """
    if text_encoders not in ("all", "clip"):
        raise UserError(f"unknown text encoders {text_encoders!r}", f"{option('text_encoders')} with one of: all, clip")
    left_out = t5_parts(index) if text_encoders == "clip" else []
    return [name for name in named_components(index) if READ.fullmatch(name) and name not in left_out]


def descriptions(names: Iterable[str], parts: Collection[str], variant: tuple[str, ...] = ()) -> list[str]:
    """Choose from the files `names` the configurations, vocabularies and shard indices of the components `parts`.

    Of the indices, it is those of the variants that may be read if the user asks for `variant`.
    """
    found = []
    paths = [path for path in map(PurePosixPath, sorted(names)) if str(path.parent) in parts]
    for path in paths:
        there = [other.name for other in paths if other.parent == path.parent]
        if path.suffix in DESCRIPTIONS and (".index." not in path.name or path.name in indices(there, variant)):
            found.append(str(path))
    return found


def weights(folder: Path, names: Collection[str], parts: Iterable[str], variant: tuple[str, ...] = ()) -> list[str]:
    """Choose from the files `names` those with the weights of the components `parts`, in the variant asked for.

    The indices of shards must be in `folder` already. Raises UserError if a component has no weights in safetensors, if
    an index is damaged or names a shard that is not in the repository, or if it is open which variant is meant.
    """
    found: list[str] = []
    report = LoadReport(variants=variant)
    for part in parts:
        if WITHOUT_WEIGHTS.fullmatch(part):
            continue
        there = [path.name for path in map(PurePosixPath, names) if str(path.parent) == part]
        chosen = choose(part, there, partial(_shards, folder / part), report, AGAIN)
        if chosen is None:
            others = sorted(name for name in names if name.startswith(f"{part}/") and name.endswith(OTHER_WEIGHTS))
            only = f"only {', '.join(others[:3])}" if others else "nothing"
            problem = f"the weights of {part} are not there as {part}/{SINGLE_FILES[part.startswith('text')]}, {only}"
            raise UserError(problem, "take a repository with weights in safetensors, in diffusers' layout")
        found += [f"{part}/{name}" for name in chosen.files]
    return found


def _shards(folder: Path, name: str) -> list[str]:
    index = folder / name
    try:
        shards = sorted(set(json.loads(read_bytes(index))["weight_map"].values()))
        if all(PurePosixPath(shard).name == shard for shard in shards):
            return shards
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    problem = f"{index.parent.name}/{index.name} is not an index of shards"
    raise UserError(problem, "take another revision of the repository, or ask its owner")
