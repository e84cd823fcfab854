"""Checkpoints in one file: recognise the layout by its keys, and make diffusers' tensors from the file's.

A file has the layout of the family's authors or that of ComfyUI. It holds the DiT alone or several components, in
16 bits or in float8, with or without scales. The names are mapped by diffusers' own converters
(diffusers.loaders.single_file_utils), which run here on recipes (conversion.py) instead of tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from diffusers.loaders import single_file_utils

from ditforge.errors import UserError
from ditforge.export.checkpoint import hub
from ditforge.export.checkpoint.adapters.keys import check_kind, is_adapter
from ditforge.export.checkpoint.architectures import CLIP_QUERIES, architecture_of, encoder_of, gguf_name
from ditforge.export.checkpoint.conversion import Piece, Recipe, Tensors
from ditforge.export.checkpoint.dequantising import dequantised
from ditforge.export.checkpoint.diffusers_folder import CONFIG, INDEX, Checkpoint, components_in, read_json
from ditforge.export.checkpoint.gguf_file import open_gguf
from ditforge.export.checkpoint.gguf_header import is_gguf, read_gguf_header
from ditforge.export.checkpoint.gguf_names import ENCODERS, as_in_transformers, restored
from ditforge.export.checkpoint.layout import (
    CLIP_G_WIDTH,
    CLIP_KEY,
    OWN_VAE_KEY,
    PROJECTION,
    UNUSED,
    VAE_PARTS,
    VAE_PREFIXES,
    Config,
    Layout,
    encoder_keys,
    find_vae,
    known_models,
)
from ditforge.export.checkpoint.lazy_tensors import Lazy, identity, open_tensors, transposed
from ditforge.export.checkpoint.load_report import LoadReport, shown
from ditforge.export.checkpoint.refused_formats import check_shard
from ditforge.export.checkpoint.variants import NAME_OR_PATH, names_in
from ditforge.export.checkpoint.weights import read_metadata
from ditforge.export.families import Family, families
from ditforge.option import option, setting


@dataclass(frozen=True)
class SingleFile:
    """The contents of a checkpoint in one file, or of a folder with only some networks.

    file: the file or folder.
    family: the family of its DiT; None if it has no DiT.
    components: for each of diffusers' components that it holds, the tensors by diffusers' names.
    config: the part of the DiT's configuration that is known, for a file from the shapes; {} if it has no DiT.
    configs: the configurations that it holds, by component and file name; a file holds none.
    names: what the file calls the model, for variants.py: places in the file, and names.
    """

    file: Path
    family: Family | None
    components: dict[str, dict[str, Lazy]]
    config: Config
    configs: Mapping[tuple[str, str], Config] = field(default_factory=dict)
    names: Sequence[tuple[str, str]] = ()

    def transformer_config(self, published: Path, base: Config | None = None) -> Config:
        """Return the DiT's configuration: what is known of it, and the rest from `base` or the published model.

        `published` is the folder of that model's configurations. Raises UserError if the rest is from there and that
        model has another head size. The rotary axes depend on the head size, and shapes do not tell them.
        """
        if ("transformer", CONFIG) in self.configs:
            return self.config
        if base is not None:
            return base | self.config
        known = json.loads((published / "transformer" / CONFIG).read_bytes())
        if known["attention_head_dim"] != self.config["attention_head_dim"]:
            head, usual = self.config["attention_head_dim"], known["attention_head_dim"]
            problem = f"the DiT in {self.file} has heads of {head}, {published.name} of {usual}"
            raise UserError(problem, f"{setting('base', 'FOLDER')}, a diffusers folder of this model")
        result: Config = known | self.config
        return result


def open_single_file(file: Path, report: LoadReport | None = None, base: Checkpoint | None = None) -> SingleFile:
    """Recognise the components in the safetensors or GGUF file by its keys. No weight is read.

    `base` is the folder that completes the file; where the file has no DiT, it tells which text encoder is meant. The
    tensors that belong to no component are added to `report`. Raises UserError if no component is known, if a tensor is
    missing, if a component has a tensor that does not belong to it, or if the model is of another architecture.
    """
    report = report or LoadReport()
    check_shard(file)
    tensors = dequantised(as_in_comfy(open_contents(file, report), base), report)
    refuse_other_architectures(file, tensors)
    components: dict[str, dict[str, Lazy]] = {}
    family, prefix, own = find_dit(tensors)
    used: set[str] = set()
    config: Config = {}
    if family:
        dit = without_prefix(tensors, prefix)
        if not prefix:  # the DiT's keys have no prefix, so those of other components must be told apart by theirs
            others = ("text_encoders.", *filter(None, VAE_PREFIXES))
            dit = {key: tensor for key, tensor in dit.items() if not key.startswith(others)}
        components["transformer"] = dit if own else convert_dit(family, dit, file)
        config = read_config(family, dit, file, own)
        used.update(prefix + key for key in dit)
    known = family or family_with(base)
    for name, folder in encoder_folders(known, tensors).items():
        if keys := encoder_keys(name, tensors):
            components[folder] = encoder_tensors({key: tensors[full] for key, full in keys.items()})
            used.update(keys.values())
            if known and known.layout and name in known.layout.projected:
                add_projection(name, components[folder], report)
    vae_prefix = find_vae(tensors)
    if vae_prefix is not None:
        vae = without_prefix(tensors, vae_prefix)
        if not vae_prefix:
            vae = {key: tensor for key, tensor in vae.items() if key.startswith(VAE_PARTS)}
        components["vae"] = vae if OWN_VAE_KEY in vae else convert_vae(vae, file)
        used.update(vae_prefix + key for key in vae)
    if not components:
        raise unknown(file, tensors)
    report_unused([key for key in tensors if key not in used], file, report)
    if family and "kontext" in f"{file.name} {' '.join(read_metadata(file).values())}".lower():
        why = (
            "FLUX.1 Kontext, if it is that, has the tensors of FLUX.1-dev and is exported as that: without its picture"
        )
        report.add(f"the name or the metadata of {file} speak of Kontext", why)
    return SingleFile(file, family, components, config, names=names_of(file))


def open_folder(folder: Path, report: LoadReport, base: Checkpoint) -> SingleFile:
    """Open a folder with only some of a checkpoint's networks, in diffusers' layout, as trainers save it.

    Raises UserError if its DiT is of another class than that of the base.
    """
    components, configs = {}, {}
    for name, place in components_in(folder).items():
        alone = Checkpoint(place.parent, "", variant=report.variants, report=report)
        components[name] = dict(alone.read_component(place.name))
        configs[name, CONFIG] = read_json(place / CONFIG)
    config = configs.get(("transformer", CONFIG), {})
    cls, wanted = config.get("_class_name"), (base.config("", INDEX).get("transformer") or [None])[-1]
    if config and cls != wanted:
        problem = f"{folder} holds a {cls}, and the transformer of {base.folder} is a {wanted}"
        raise UserError(problem, f"{setting('base', 'FOLDER')}, a diffusers folder of the same family")
    names = [("its _name_or_path", str(config.get(NAME_OR_PATH) or ""))]
    family = family_with(base) if config else None
    return SingleFile(folder, family, components, config, configs, [("the Hub", hub.name_of(folder)), *names])


def names_of(file: Path) -> list[tuple[str, str]]:
    """Return what the file is called by the Hub and in its metadata, for variants.py."""
    return [("the Hub", hub.name_of(file)), *names_in(read_metadata(file))]


def report_unused(keys: Iterable[str], file: Path, report: LoadReport) -> None:
    """Add the tensors of `file` that belong to no component to the report."""
    left: dict[str, list[str]] = {}
    for key in keys:
        reason = next((reason for pattern, reason in UNUSED.items() if pattern.fullmatch(key)), "")
        left.setdefault(reason, []).append(key)
    for reason, those in left.items():
        unknown = "no component of a known model has such tensors, so they are ignored"
        report.add(f"{shown(those)} in {file}", reason or unknown, expected=bool(reason))


def family_with(base: Checkpoint | None) -> Family | None:
    """Return the family of the base; None if there is no base, or if no family has its pipeline."""
    return next((family for family in families() if base and family.pipeline == base.pipeline), None)


def encoder_tensors(tensors: Tensors) -> dict[str, Lazy]:
    """Return a text encoder's tensors by transformers' names. OpenCLIP writes the projection transposed."""
    found = dict(tensors)
    if (projection := found.pop(PROJECTION, None)) is not None and f"{PROJECTION}.weight" not in found:
        found[f"{PROJECTION}.weight"] = transposed(projection)
    return found


def add_projection(name: str, encoder: dict[str, Lazy], report: LoadReport) -> None:
    """Add the identity as the projection of a CLIP whose file lacks it.

    diffusers does so too (single_file_utils.create_diffusers_clip_model_from_ldm), and so does ComfyUI.
    """
    if f"{PROJECTION}.weight" in encoder or CLIP_KEY not in encoder:
        return
    positions = encoder[CLIP_KEY]
    encoder[f"{PROJECTION}.weight"] = identity(positions.shape[1], positions)
    reason = f"{positions.file} lacks it, which means that it is the identity"
    report.add(f"{PROJECTION}.weight of {name}", reason, expected=True)


def open_contents(file: Path, report: LoadReport) -> dict[str, Lazy]:
    """Return the tensors of a safetensors or GGUF file, unread. Those of llama.cpp get the names of transformers."""
    if not is_gguf(file):
        return open_tensors(file)
    contents = open_gguf(file)
    if contents.architecture in ENCODERS:
        return as_in_transformers(contents, report)
    return {name: restored(name, tensor) for name, tensor in contents.tensors.items()}


def as_in_comfy(tensors: dict[str, Lazy], base: Checkpoint | None = None) -> dict[str, Lazy]:
    """Return the tensors of a file that is one text encoder as ComfyUI has them in a file with several components.

    Of two CLIPs, it is the one that is as wide as that of the base.
    """
    encoder = encoder_of(tensors)
    if encoder is None:
        return tensors
    if encoder == "clip":
        width = next(tensors[key].shape[-1] for key in CLIP_QUERIES if key in tensors)
        family = family_with(base)
        folders = family.layout.encoders if family and family.layout else {}
        clips = {name: folder for name, folder in folders.items() if name.startswith("clip")}
        same = [name for name, folder in clips.items() if base and base.config(folder).get("hidden_size") == width]
        encoder = same[0] if len(same) == 1 else "clip_l" if width < CLIP_G_WIDTH else "clip_g"
    return {f"text_encoders.{encoder}.transformer.{name}": tensor for name, tensor in tensors.items()}


def refuse_other_architectures(file: Path, tensors: Tensors) -> None:
    """Raise UserError if the file holds a model of an architecture that is known and cannot be exported."""
    if is_adapter(tensors):
        return
    if name := architecture_of({key: tensor.shape for key, tensor in tensors.items()}):
        raise other_architecture(file, name)


def other_architecture(file: Path, name: str) -> UserError:
    """Return the error for a model of another architecture."""
    return UserError(f"{file} is {name}, which cannot be exported", f"use {known_models()}, or a fine-tune of them")


def require(single: SingleFile, needed: Iterable[str], base: Path | None) -> None:
    """Raise UserError, naming the option that helps, if neither the file nor `base` has a component of `needed`.

    `needed` has the names of model_index.json. It includes tokenizers, which no single file holds.
    """
    missing = [name for name in needed if name not in single.components and not (base and (base / name).is_dir())]
    if missing:
        where = f"{single.file} has {', '.join(single.components)}"
        where += f", and {base} does not have the rest" if base else ""
        fix = "a diffusers folder of the model it was made from, which has them"
        raise UserError(f"{', '.join(missing)} missing: {where}", f"{setting('base', 'FOLDER')}, {fix}")


def find_dit(tensors: Tensors) -> tuple[Family | None, str, bool]:
    """Return the family of the DiT among the tensors, the prefix of its keys, and whether they have diffusers' names.

    It is (None, "", False) if there is no DiT.
    """
    for family in families():
        if family.layout and (found := family.layout.find(tensors)):
            return family, *found
    return None, "", False


def encoder_folders(family: Family | None, tensors: Tensors) -> Mapping[str, str]:
    """Map ComfyUI's name of each text encoder to diffusers' folder.

    A file without a DiT does not tell its family: then the family with the fewest text encoders is taken that has all
    those in the file.
    """
    if family and family.layout:
        return family.layout.encoders
    there = {key.split(".")[1] for key in tensors if key.startswith("text_encoders.")}
    having = [family.layout.encoders for family in families() if family.layout]
    return min((encoders for encoders in having if there <= encoders.keys()), key=len, default={})


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, Lazy]:
    """Return the tensors whose names start with the prefix, by their names without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def convert_dit(family: Family, tensors: Tensors, file: Path) -> dict[str, Lazy]:
    """Return the DiT's tensors by diffusers' names. Raises UserError if one is missing or does not belong to it."""
    recipes = {key: Recipe((Piece(key),), tensor.shape) for key, tensor in tensors.items()}
    assert family.layout, f"{family.name} has no layout, and was found by it"
    try:
        converted = family.layout.convert(recipes)  # removes from `recipes` what it uses
    except (KeyError, IndexError, ValueError) as error:  # the last two: block numbers are missing, or are no numbers
        lacks = f"the tensor {error.args[0]}" if isinstance(error, KeyError) else "blocks with numbers"
        problem = f"{file} lacks {lacks} of the DiT of {family.title}"
        raise UserError(problem, f"copy the file again; a LoRA belongs to {option('loras', '--lora')}") from error
    if recipes:
        problem = f"{file} holds a DiT that is built otherwise: {shown(list(recipes))} have no place in it"
        raise UserError(problem, f"use {known_models()}, or a fine-tune of them")
    return {name: recipe.of(tensors) for name, recipe in converted.items()}


def read_config(family: Family, tensors: Tensors, file: Path, own: bool = False) -> Config:
    """Return the part of the DiT's configuration that shapes tell. `own` says that tensors have diffusers' names.

    Raises UserError for shapes that no such DiT has.
    """
    assert family.layout, f"{family.name} has no layout, and was found by it"
    try:
        return family.layout.own_config(tensors) if own else family.layout.config(tensors)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        problem = f"the shapes in {file} are not those of the DiT of {family.title}: {error}"
        raise UserError(problem, "copy the file again") from error


def convert_vae(tensors: Tensors, file: Path) -> dict[str, Lazy]:
    """Return the autoencoder's tensors by diffusers' names.

    Raises UserError if a tensor is missing or does not belong to it.
    """
    recipes = {key: Recipe((Piece(key),), tensor.shape) for key, tensor in tensors.items()}
    levels = len({key.split(".")[2] for key in tensors if key.startswith("decoder.up.")})
    config = {"down_block_types": range(levels), "up_block_types": range(levels)}  # only their lengths are read
    try:
        converted = single_file_utils.convert_ldm_vae_checkpoint(recipes, config)
    except KeyError as error:
        problem = f"{file} lacks the tensor {error.args[0]} of the autoencoder"
        raise UserError(problem, "copy the file again") from error
    converted = {name: recipe for name, recipe in converted.items() if recipe is not None}  # None: no such bias
    if left := set(tensors) - {piece.name for recipe in converted.values() for piece in recipe.pieces}:
        problem = f"{file} holds an autoencoder that is built otherwise: {shown(sorted(left))} have no place in it"
        raise UserError(problem, f"{setting('base', 'FOLDER')} has the right one; leave this one out of the file")
    return {name: recipe.of(tensors) for name, recipe in converted.items()}


class _AnyKey(dict[str, Recipe]):
    """A stand-in for a checkpoint, for a converter to run on: it claims to have every key that is asked for."""

    def pop(self, key: str, *default: object) -> Recipe:
        return Recipe((Piece(key),))


def recipes_for(layout: Layout, names: Iterable[str]) -> dict[str, Recipe]:
    """Return for each of diffusers' `names` the recipe that makes it from the tensors in the authors' layout."""
    names = set(names)
    made_up = _AnyKey({key: Recipe((Piece(key),)) for key in layout.hints(names)})
    return {name: recipe for name, recipe in layout.convert(made_up).items() if name in names}


def lora_of(file: Path) -> str:
    """Return the option that gives the LoRA `file`."""
    return option(f'loras=["{file}"]', f"--lora {quote(f'{file}:1.0')}")


def unknown(file: Path, tensors: Tensors) -> UserError:
    """Return the error that says why nothing in the file can be used."""
    keys = list(tensors)
    if is_gguf(file) and (name := gguf_name(read_gguf_header(file).architecture)):
        return other_architecture(file, name)
    check_kind(file, keys)
    if is_adapter(keys):
        return UserError(
            f"{file} is a LoRA, not a checkpoint", f"give the checkpoint that it belongs to, and {lora_of(file)}"
        )
    fix = f"use a file of {known_models()}, in its authors' layout or ComfyUI's"
    return UserError(f"{file} is of no known layout: it has {shown(keys)}", fix)
