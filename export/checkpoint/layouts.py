"""Checkpoints in one file: which layout it is, told by its keys, and what each of diffusers' tensors is made of.

A file is in the layout of a family's authors, or in ComfyUI's: DiT alone, or all in one, in 16 bits or in float8 with
or without scales. The names are mapped by diffusers' own converters (diffusers.loaders.single_file_utils), which run
here on recipes instead of tensors.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders import single_file_utils

from ditforge.errors import DitforgeWarning, UserError
from ditforge.export.checkpoint.conversion import Piece, Recipe, Tensors
from ditforge.export.checkpoint.float8 import dequantised
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors
from ditforge.export.families import Family, families
from ditforge.option import option, setting

DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
VAE_KEY = "decoder.up.0.block.0.conv1.weight"
UNUSED_KEYS = re.compile(r".*\.(logit_scale|position_ids|spiece_model)|(.*\.)?(model_ema\.|denoiser\.).*")
SHOWN = 3  # names in a message

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a family's DiT is written by its authors.

    key: the name of a tensor that only this layout has.
    convert: diffusers' converter from the authors' names to its own.
    hints: the authors' names that tell the converter how many blocks there are, made up from diffusers' names.
    config: the configuration, as far as the shapes of the authors' tensors tell.
    published: which of the family's published models has the rest of such a configuration.
    encoders: in which of diffusers' folders each text encoder is, by ComfyUI's names.
    lora_encoders: the same by the prefixes of Kohya's LoRA files.
    """

    key: str
    convert: Callable[[dict[str, Recipe]], dict[str, Recipe]]
    hints: Callable[[Iterable[str]], list[str]]
    config: Callable[[Tensors], Config]
    published: Callable[[Config], str]
    encoders: Mapping[str, str]
    lora_encoders: Mapping[str, str]


def count_blocks(names: Iterable[str], kind: str) -> int:
    """How many blocks `kind`.0, `kind`.1, … there are."""
    numbers = [name.split(".")[1] for name in names if name.startswith(f"{kind}.")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


@dataclass(frozen=True)
class SingleFile:
    """What one file holds: for each of diffusers' components, its tensors by the names that diffusers gives them.

    `family` is the DiT's, and `config` what its shapes say of its configuration; None and {} for a file with no DiT.
    `published` is the folder of a published model whose values fill up the rest.
    """

    file: Path
    family: Family | None
    components: dict[str, dict[str, Lazy]]
    config: Config
    published: Path | None

    def transformer_config(self, base: Config | None = None) -> Config:
        """The DiT's configuration: what the shapes say, and the rest from `base`, or else as published.

        Raises UserError if the published one is of another head size, whose rotary axes shapes do not tell.
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


def open_single_file(file: Path) -> SingleFile:
    """Recognise what is in the safetensors file, by its keys. No weight is read.

    Raises UserError if nothing in it is known, if a tensor is lacking, or if one is left over in the DiT.
    """
    tensors = dequantised(open_tensors(file))
    components: dict[str, dict[str, Lazy]] = {}
    family, prefix = find_dit(tensors)
    used: set[str] = set()
    config: Config = {}
    if family:
        dit = without_prefix(tensors, prefix)
        if not prefix:  # nothing in front of the DiT's own keys: what else is in the file has prefixes
            others = ("text_encoders.", *filter(None, VAE_PREFIXES))
            dit = {key: tensor for key, tensor in dit.items() if not key.startswith(others)}
        components["transformer"] = convert_dit(family, dit, file)
        config = read_config(family, dit, file)
        used.update(prefix + key for key in dit)
    for name, folder in encoder_folders(family, tensors).items():
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
        warnings.warn(f"{file}: {shown(left)} are of no use here", DitforgeWarning, stacklevel=2)
    published = family.published[family.layout.published(config)] if family and family.layout else None
    return SingleFile(file, family, components, config, published)


def require(single: SingleFile, needed: Iterable[str], base: Path | None) -> None:
    """Raise UserError, with the option that helps, if the file lacks a component of `needed` that `base` lacks too.

    `needed` are components as model_index.json names them: tokenizers too, which no such file holds.
    """
    missing = [name for name in needed if name not in single.components and not (base and (base / name).is_dir())]
    if missing:
        where = f"{single.file} has {', '.join(single.components)}"
        where += f", and {base} does not have the rest" if base else ""
        fix = "a diffusers folder of the model it was made from, which has them"
        raise UserError(f"{', '.join(missing)} missing: {where}", f"{setting('base', 'FOLDER')}, {fix}")


def find_dit(tensors: Tensors) -> tuple[Family | None, str]:
    """The family of the DiT among the tensors, and what stands before its keys; None where there is none."""
    for family in families():
        for prefix in DIT_PREFIXES:
            if family.layout and prefix + family.layout.key in tensors:
                return family, prefix
    return None, ""


def encoder_folders(family: Family | None, tensors: Tensors) -> Mapping[str, str]:
    """Where diffusers has each text encoder.

    That is told by the DiT, or without one by the family with the fewest text encoders that has all that are there.
    """
    if family and family.layout:
        return family.layout.encoders
    there = {key.split(".")[1] for key in tensors if key.startswith("text_encoders.")}
    having = [family.layout.encoders for family in families() if family.layout]
    return min((encoders for encoders in having if there <= encoders.keys()), key=len, default={})


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, Lazy]:
    """The tensors behind the prefix, by their names without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def convert_dit(family: Family, tensors: Tensors, file: Path) -> dict[str, Lazy]:
    """The DiT's tensors by diffusers' names. Raises UserError if one is lacking or left over."""
    recipes = {key: Recipe((Piece(key),), tensor.shape) for key, tensor in tensors.items()}
    assert family.layout, f"{family.name} has no layout, and was found by it"
    try:
        converted = family.layout.convert(recipes)  # takes away what it uses
    except (KeyError, IndexError, ValueError) as error:  # not a KeyError where block numbers are missing or are none
        lacks = f"the tensor {error.args[0]}" if isinstance(error, KeyError) else "blocks with numbers"
        problem = f"{file} lacks {lacks} of the DiT of {family.title}"
        raise UserError(problem, f"copy the file again; a LoRA belongs to {option('loras', '--lora')}") from error
    if recipes:
        problem = f"{file} holds a DiT that is built otherwise: {shown(list(recipes))} have no place in it"
        raise UserError(problem, f"use {known_models()}, or a fine-tune of them")
    return {name: recipe.of(tensors) for name, recipe in converted.items()}


def read_config(family: Family, tensors: Tensors, file: Path) -> Config:
    """The DiT's configuration as far as shapes tell. Raises UserError for shapes that no such DiT has."""
    assert family.layout, f"{family.name} has no layout, and was found by it"
    try:
        return family.layout.config(tensors)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        problem = f"the shapes in {file} are not those of the DiT of {family.title}: {error}"
        raise UserError(problem, "copy the file again") from error


def convert_vae(tensors: Tensors, file: Path) -> dict[str, Lazy]:
    """The autoencoder's tensors by diffusers' names. Raises UserError if one is left over."""
    recipes = {key: Recipe((Piece(key),), tensor.shape) for key, tensor in tensors.items()}
    levels = len({key.split(".")[2] for key in tensors if key.startswith("decoder.up.")})
    config = {"down_block_types": range(levels), "up_block_types": range(levels)}  # it asks for no more than how many
    try:
        converted = single_file_utils.convert_ldm_vae_checkpoint(recipes, config)
    except KeyError as error:
        problem = f"{file} lacks the tensor {error.args[0]} of the autoencoder"
        raise UserError(problem, "copy the file again") from error
    converted = {name: recipe for name, recipe in converted.items() if recipe is not None}  # a bias that is lacking
    if left := set(tensors) - {piece.name for recipe in converted.values() for piece in recipe.pieces}:
        problem = f"{file} holds an autoencoder that is built otherwise: {shown(sorted(left))} have no place in it"
        raise UserError(problem, f"{setting('base', 'FOLDER')} has the right one; leave this one out of the file")
    return {name: recipe.of(tensors) for name, recipe in converted.items()}


class _AnyKey(dict[str, Recipe]):
    """A checkpoint of which only the blocks are known: it has every key that a converter asks for."""

    def pop(self, key: str, *default: object) -> Recipe:
        return Recipe((Piece(key),))


def recipes_for(layout: Layout, names: Iterable[str]) -> dict[str, Recipe]:
    """How a DiT with diffusers' `names` is made of its authors' tensors, by diffusers' names."""
    names = set(names)
    made_up = _AnyKey({key: Recipe((Piece(key),)) for key in layout.hints(names)})
    return {name: recipe for name, recipe in layout.convert(made_up).items() if name in names}


def lora_of(file: Path) -> str:
    """How a LoRA is given."""
    return option(f'loras=["{file}"]', f"--lora {file}:1.0")


def unknown(file: Path, tensors: Tensors) -> UserError:
    """Why nothing in the file can be used."""
    keys = list(tensors)
    if any(".lora_" in key or ".lora." in key for key in keys):
        return UserError(
            f"{file} is a LoRA, not a checkpoint", f"give the checkpoint that it belongs to, and {lora_of(file)}"
        )
    if any(key.startswith("transformer_blocks.") for key in keys):
        return UserError(f"{file} is one file of a diffusers folder", "give the folder that has model_index.json")
    fix = f"use a file of {known_models()}, in its authors' layout or ComfyUI's"
    return UserError(f"{file} is of no known layout: it has {shown(keys)}", fix)


def known_models() -> str:
    """The families whose files are known, in words."""
    return " or ".join(family.title for family in families() if family.layout)


def shown(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "no tensors") + rest
