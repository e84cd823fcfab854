"""Checkpoints in one file: recognise the layout by its keys, and make diffusers' tensors from the file's.

A file has the layout of the family's authors or that of ComfyUI. It holds the DiT alone or several components, in
16 bits or in float8, with or without scales. The names are mapped by diffusers' own converters
(diffusers.loaders.single_file_utils), which run here on recipes (conversion.py) instead of tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from diffusers.loaders import single_file_utils

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.keys import is_adapter
from ditforge.export.checkpoint.architectures import GGUF_NAMES, architecture_of, encoder_of
from ditforge.export.checkpoint.conversion import Piece, Recipe, Tensors
from ditforge.export.checkpoint.dequantising import dequantised
from ditforge.export.checkpoint.gguf_file import is_gguf, open_gguf
from ditforge.export.checkpoint.gguf_names import ENCODERS, as_in_transformers, restored
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors
from ditforge.export.checkpoint.load_report import LoadReport, shown
from ditforge.export.checkpoint.weights import read_metadata
from ditforge.export.families import Family, families
from ditforge.option import option, setting

DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
CLIP_G_WIDTH = 1280
VAE_KEY = "decoder.up.0.block.0.conv1.weight"
UNUSED_KEYS = re.compile(r".*\.(logit_scale|position_ids|spiece_model)|(.*\.)?(model_ema\.|denoiser\.).*")

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How the authors of a family write its DiT into a file.

    key: the name of a tensor that only this layout has.
    convert: diffusers' converter from the authors' names to diffusers' names.
    hints: takes diffusers' names, and returns names in the authors' layout from which `convert` counts the blocks.
    config: takes the authors' tensors, and returns the part of the DiT's configuration that their shapes tell.
    published: takes that configuration, and returns the name of the published model that has the rest of it.
    encoders: maps ComfyUI's name of each text encoder to diffusers' folder.
    lora_encoders: maps each prefix in Kohya's LoRA files to diffusers' folder of the text encoder.
    lora_joint: maps the name that adapters have for several of diffusers' modules at once to these modules, in the
        order of their rows. {} stands for the number of the block.
    lora_optional: patterns of modules that not all models of the family have, as `transformer.block_0_part` without
        further dots, and why a checkpoint can do without what an adapter has for them.
    """

    key: str
    convert: Callable[[dict[str, Recipe]], dict[str, Recipe]]
    hints: Callable[[Iterable[str]], list[str]]
    config: Callable[[Tensors], Config]
    published: Callable[[Config], str]
    encoders: Mapping[str, str]
    lora_encoders: Mapping[str, str]
    lora_joint: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lora_optional: Mapping[str, str] = field(default_factory=dict)


def count_blocks(names: Iterable[str], kind: str) -> int:
    """Count the blocks `kind`.0, `kind`.1, … among the names."""
    numbers = [name.split(".")[1] for name in names if name.startswith(f"{kind}.")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


@dataclass(frozen=True)
class SingleFile:
    """The contents of a checkpoint in one file.

    file: the file.
    family: the family of its DiT; None if it has no DiT.
    components: for each of diffusers' components that it holds, the tensors by diffusers' names.
    config: the part of the DiT's configuration that the shapes tell; {} if it has no DiT.
    published: the configurations' folder of a published model, from which the rest is taken; None if it has no DiT.
    """

    file: Path
    family: Family | None
    components: dict[str, dict[str, Lazy]]
    config: Config
    published: Path | None

    def transformer_config(self, base: Config | None = None) -> Config:
        """Return the DiT's configuration: what the shapes tell, and the rest from `base` or the published model.

        Raises UserError if the rest is from the published model and that has another head size. The rotary axes depend
        on the head size, and shapes do not tell them.
        """
        if base is not None:
            return base | self.config
        assert self.published is not None, f"{self.file} holds no DiT"
        known = json.loads((self.published / "transformer" / "config.json").read_bytes())
        if known["attention_head_dim"] != self.config["attention_head_dim"]:
            head, usual = self.config["attention_head_dim"], known["attention_head_dim"]
            problem = f"the DiT in {self.file} has heads of {head}, {self.published.name} of {usual}"
            raise UserError(problem, f"{setting('base', 'FOLDER')}, a diffusers folder of this model")
        result: Config = known | self.config
        return result


def open_single_file(file: Path, report: LoadReport | None = None, pipeline: str | None = None) -> SingleFile:
    """Recognise the components in the safetensors or GGUF file by its keys. No weight is read.

    The tensors that belong to no component are added to `report`. `pipeline` is the class of the base's pipeline, which
    tells the components' names in a file without a DiT. Raises UserError if no component is known, if a tensor is
    missing, if a component has a tensor that does not belong to it, or if the model is of another architecture.
    """
    report = report or LoadReport()
    tensors = dequantised(as_in_comfy(open_contents(file, report)), report)
    refuse_other_architectures(file, tensors)
    components: dict[str, dict[str, Lazy]] = {}
    family, prefix = find_dit(tensors)
    used: set[str] = set()
    config: Config = {}
    if family:
        dit = without_prefix(tensors, prefix)
        if not prefix:  # the DiT's keys have no prefix, so those of other components must be told apart by theirs
            others = ("text_encoders.", *filter(None, VAE_PREFIXES))
            dit = {key: tensor for key, tensor in dit.items() if not key.startswith(others)}
        components["transformer"] = convert_dit(family, dit, file)
        config = read_config(family, dit, file)
        used.update(prefix + key for key in dit)
    of_base = next((known for known in families() if known.pipeline == pipeline), None)
    for name, folder in encoder_folders(family or of_base, tensors).items():
        encoder = f"text_encoders.{name}.transformer."
        if found := without_prefix(tensors, encoder):
            components[folder] = found
            used.update(encoder + key for key in found)
    vae_prefix = next((p for p in VAE_PREFIXES if p + VAE_KEY in tensors), None)
    if vae_prefix is not None:
        vae = without_prefix(tensors, vae_prefix)
        components["vae"] = convert_vae(vae, file)
        used.update(vae_prefix + key for key in vae)
    if not components:
        raise unknown(file, tensors)
    if left := [key for key in tensors if key not in used and not UNUSED_KEYS.fullmatch(key)]:
        report.add(f"{shown(left)} in {file}", "no component of a known model has such tensors, so they are ignored")
    if family and "kontext" in f"{file.name} {' '.join(read_metadata(file).values())}".lower():
        why = (
            "FLUX.1 Kontext, if it is that, has the tensors of FLUX.1-dev and is exported as that: without its picture"
        )
        report.add(f"the name or the metadata of {file} speak of Kontext", why)
    published = family.published[family.layout.published(config)] if family and family.layout else None
    return SingleFile(file, family, components, config, published)


def open_contents(file: Path, report: LoadReport) -> dict[str, Lazy]:
    """Return the tensors of a safetensors or GGUF file, unread. Those of llama.cpp get the names of transformers.

    Raises UserError for a GGUF file of another architecture.
    """
    if not is_gguf(file):
        return open_tensors(file)
    contents = open_gguf(file)
    if contents.architecture in ENCODERS:
        return as_in_transformers(contents, report)
    if contents.architecture in GGUF_NAMES and not any(key.endswith(layout_keys()) for key in contents.tensors):
        raise other_architecture(file, GGUF_NAMES[contents.architecture])
    return {name: restored(name, tensor) for name, tensor in contents.tensors.items()}


def layout_keys() -> tuple[str, ...]:
    """Return the names of the tensors by which the families' layouts are recognised."""
    return tuple(family.layout.key for family in families() if family.layout)


def as_in_comfy(tensors: dict[str, Lazy]) -> dict[str, Lazy]:
    """Return the tensors of a file that is one text encoder as ComfyUI has them in a file with several components."""
    encoder = encoder_of(tensors)
    if encoder is None:
        return tensors
    if encoder == "clip":
        width = tensors["text_model.encoder.layers.0.self_attn.q_proj.weight"].shape[-1]
        encoder = "clip_l" if width < CLIP_G_WIDTH else "clip_g"
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


def find_dit(tensors: Tensors) -> tuple[Family | None, str]:
    """Return the family of the DiT among the tensors, and the prefix of its keys; (None, "") if there is no DiT."""
    for family in families():
        for prefix in DIT_PREFIXES:
            if family.layout and prefix + family.layout.key in tensors:
                return family, prefix
    return None, ""


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


def read_config(family: Family, tensors: Tensors, file: Path) -> Config:
    """Return the part of the DiT's configuration that shapes tell. Raises UserError for shapes that no such DiT has."""
    assert family.layout, f"{family.name} has no layout, and was found by it"
    try:
        return family.layout.config(tensors)
    except (ValueError, IndexError, ZeroDivisionError) as error:
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
    if is_adapter(keys):
        return UserError(
            f"{file} is a LoRA, not a checkpoint", f"give the checkpoint that it belongs to, and {lora_of(file)}"
        )
    if any(key.startswith("transformer_blocks.") for key in keys):
        return UserError(f"{file} is one file of a diffusers folder", "give the folder that has model_index.json")
    fix = f"use a file of {known_models()}, in its authors' layout or ComfyUI's"
    return UserError(f"{file} is of no known layout: it has {shown(keys)}", fix)


def known_models() -> str:
    """Return the titles of the families whose single files can be read, joined by "or"."""
    return " or ".join(family.title for family in families() if family.layout)
