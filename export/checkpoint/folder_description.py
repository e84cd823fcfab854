"""What a folder is, from configurations and headers alone: for `ditforge inspect`. Nothing here needs PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ditforge.contents import CheckpointFolder, CheckpointPart
from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.folder import chosen
from ditforge.export.checkpoint.component_files import WEIGHTS, variants
from ditforge.export.checkpoint.description import TensorFile, describe_file, size_of
from ditforge.export.checkpoint.diffusers_folder import (
    CONFIG,
    INDEX,
    Checkpoint,
    components_in,
    elsewhere,
    named_components,
    open_checkpoint,
    read_json,
    report_files,
    unknown_pipeline,
)
from ditforge.export.checkpoint.hub import name_of
from ditforge.export.checkpoint.hub_files import READ, WITHOUT_WEIGHTS
from ditforge.export.checkpoint.layout import Layout, layouts
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.refused_formats import METHODS, check_method, method_of
from ditforge.export.checkpoint.variants import NAME_OR_PATH, Evidence, choose, evidence_of, titles
from ditforge.export.checkpoint.weights import component_files, file_names, read_header
from ditforge.option import command

PLAIN = {"F64", "F32", "F16", "BF16"}


def describe_folder(folder: Path) -> CheckpointFolder | TensorFile:
    """Describe a folder with a checkpoint in diffusers' layout, with some networks of one, or with one file of tensors.

    Raises UserError for other folders, and for a model_index.json that is damaged.
    """
    if (folder / INDEX).is_file():
        return whole(folder)
    if parts := components_in(folder):
        return partial(folder, parts)
    here = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]  # no deeper: it may be a whole disk
    files = chosen(str(file.relative_to(folder)).replace("\\", "/") for file in here)
    if len(files) == 1:
        return describe_file(folder / files[0])
    problem = f"{folder} is no checkpoint and no output of ditforge: it has no {INDEX} and no manifest.json"
    if files:
        raise UserError(f"{problem}, but {len(files)} .safetensors files", f"give one of them: {folder / files[0]}")
    raise UserError(problem, elsewhere(folder))


def whole(folder: Path) -> CheckpointFolder:
    """Describe a checkpoint in diffusers' layout."""
    checkpoint, report = open_checkpoint(folder), LoadReport()
    index = checkpoint.config("", INDEX)
    named = {name: str(index[name][-1]) for name in named_components(index)}
    problems: list[UserError] = []
    parts = tuple(part(name, cls, folder / name, report, problems) for name, cls in named.items())
    described = summed("checkpoint", folder, parts, checkpoint.pipeline)
    report_files(folder, report)
    layout = next((one for one in layouts() if one.pipeline == checkpoint.pipeline), None)
    if layout is None:
        known = [one.pipeline for one in layouts()]
        problems.insert(0, unknown_pipeline(folder, checkpoint.pipeline, known))
    else:
        described = replace(described, family=layout.title)
        try:
            here = replace(checkpoint, repository=name_of(folder))
            described = with_variant(described, layout, evidence_of(here, config_of(layout, here)), report)
        except UserError as error:
            described = replace(described, variant=possible(layout, checkpoint))
            problems.append(error)
    return concluded(described, command("ditforge export {} --out DIR", folder), report, problems)


def partial(folder: Path, places: Mapping[str, Path]) -> CheckpointFolder:
    """Describe a folder with only some networks of a checkpoint."""
    report, problems = LoadReport(), list[UserError]()
    configs = {name: read_json(place / CONFIG) for name, place in places.items()}
    parts = tuple(part(name, class_of(configs[name]), place, report, problems) for name, place in places.items())
    described = summed("part of a checkpoint", folder, parts, "")
    cls = class_of(configs.get("transformer", {}))
    layout = next((one for one in layouts() if cls and one.class_name == cls), None)
    if layout is not None:
        config = {**layout.defaults, **configs["transformer"]}
        described = replace(described, family=layout.title)
        names = [("the Hub", name_of(folder)), ("its _name_or_path", str(config.get(NAME_OR_PATH) or ""))]
        try:
            described = with_variant(described, layout, Evidence(folder, config, names=names), report)
        except UserError:  # the base may tell
            described = replace(described, variant=titles(one for one in layout.variants if one.fits(config)))
    elif cls:
        problem = f"{folder} holds a {cls}, which cannot be exported"
        problems.insert(0, UserError(problem, f"use one of: {', '.join(one.class_name for one in layouts())}"))
    to_export = f"{command('ditforge export {} --base FOLDER --out DIR', folder)}; FOLDER is a whole diffusers folder"
    return concluded(described, to_export, report, problems)


def class_of(config: Mapping[str, Any]) -> str:
    """Return the class that a configuration of diffusers or transformers names; "" if it names none."""
    several = config.get("architectures")
    named = config.get("_class_name") or (several[0] if isinstance(several, list) and several else "")
    return str(named)


def part(name: str, class_name: str, folder: Path, report: LoadReport, problems: list[UserError]) -> CheckpointPart:
    """Describe one component. What is wrong with it is added to `problems`."""
    names = file_names(folder)
    found = CheckpointPart(name, class_name, 0, (), {}, tuple(variants(names)), "")
    if not READ.fullmatch(name):
        return found
    if not folder.is_dir():
        problem = f"{folder} is missing: {INDEX} names it"
        problems.append(UserError(problem, f"copy the folder {name} from where the checkpoint came from"))
        return found
    if WITHOUT_WEIGHTS.fullmatch(name):
        return found
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict):
        found = replace(found, quantisation=METHODS.get(method_of(quantised), method_of(quantised)))
    found = replace(found, weights=sum((folder / file).stat().st_size for file in names if WEIGHTS.fullmatch(file)))
    try:
        files = component_files(folder, report)
        dtypes = Counter[str]()
        for stored in (one for file in files for one in read_header(file).values()):
            dtypes[stored.dtype] += size_of(stored.dtype, stored.shape) if prod(stored.shape) else 0
        if isinstance(quantised, dict):
            check_method(quantised, bool(dtypes.keys() - PLAIN), folder, report)
        size = sum(file.stat().st_size for file in files)
        return replace(found, weights=size, files=tuple(file.name for file in files), dtypes=dict(dtypes.most_common()))
    except UserError as error:
        problems.append(error)
        return found


def config_of(layout: Layout, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the DiT's configuration with diffusers' defaults for what tells the variants apart."""
    return {**layout.defaults, **checkpoint.config("transformer")}


def possible(layout: Layout, checkpoint: Checkpoint) -> str:
    """Return the titles of the models that the DiT can be; "" if its configuration cannot be read."""
    try:
        config = config_of(layout, checkpoint)
    except UserError:
        return ""
    return titles(variant for variant in layout.variants if variant.fits(config))


def with_variant(described: CheckpointFolder, layout: Layout, seen: Evidence, report: LoadReport) -> CheckpointFolder:
    """Add the variant. Raises UserError if the files leave it open."""
    return replace(described, variant=choose(layout.variants, seen, report).title)


def summed(kind: str, folder: Path, parts: tuple[CheckpointPart, ...], pipeline: str) -> CheckpointFolder:
    """Describe a folder with these parts, of a model that is not known yet."""
    return CheckpointFolder(
        kind, str(folder), pipeline, "", "", sum(one.weights for one in parts), parts, (), "", "", ""
    )


def concluded(
    described: CheckpointFolder, to_export: object, report: LoadReport, problems: Iterable[UserError]
) -> CheckpointFolder:
    """Add what an export does: the command, or the first problem and its fix."""
    found = replace(described, noted=tuple(map(str, report.notes)))
    for error in problems:
        return replace(found, problem=error.problem, fix=str(error.fix))
    return replace(found, export=str(to_export))
