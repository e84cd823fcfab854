"""Checkpoints in one file: which layout it is, told by its keys, and what each of diffusers' tensors is made of.

Known are the files of Black Forest Labs and of Stability, fine-tunes in their layouts, and ComfyUI's: DiT alone, or
all in one, in 16 bits or in float8 with or without scales. The names are mapped by diffusers' own converters
(diffusers.loaders.single_file_utils), which run here on recipes instead of tensors.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

from diffusers.loaders import single_file_utils

from ditforge.errors import DitforgeWarning, UserError
from ditforge.export.checkpoint.conversion import Piece, Recipe, Tensors
from ditforge.export.checkpoint.diffusers_folder import CONFIGS
from ditforge.export.checkpoint.float8 import dequantised
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors

DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
VAE_KEY = "decoder.up.0.block.0.conv1.weight"
UNUSED_KEYS = re.compile(r".*\.(logit_scale|position_ids|spiece_model)|(.*\.)?(model_ema\.|denoiser\.).*")
SHOWN = 3  # names in a message

Config = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How a family's DiT is written by its authors.

    `key` tells it by. `convert` is diffusers' converter. `hints` makes up the keys that tell it the number of blocks,
    from diffusers' names. `config` reads off the shapes what they tell. `published` picks the folder in CONFIGS whose
    values fill up the rest. `encoders` says in which of diffusers' folders a text encoder is, by ComfyUI's names.
    """

    pipeline: str
    key: str
    convert: Callable[[dict[str, Recipe]], dict[str, Recipe]]
    hints: Callable[[Iterable[str]], list[str]]
    config: Callable[[Tensors], Config]
    published: Callable[[Config], str]
    encoders: Mapping[str, str]


def flux_config(tensors: Tensors) -> Config:
    """FluxTransformer2DModel's configuration as far as the shapes of BFL's tensors tell."""
    head = tensors["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    width, channels = tensors["img_in.weight"].shape
    out = tensors["final_layer.linear.weight"].shape[0]
    return {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": count_blocks(tensors, "double_blocks"),
        "num_single_layers": count_blocks(tensors, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "joint_attention_dim": tensors["txt_in.weight"].shape[1],
        "pooled_projection_dim": tensors["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors,
    }


def flux_hints(names: Iterable[str]) -> list[str]:
    """BFL's keys for as many blocks as there are among diffusers' `names`."""
    double, single = count_blocks(names, "transformer_blocks"), count_blocks(names, "single_transformer_blocks")
    blocks = [f"double_blocks.{i}." for i in range(double)] + [f"single_blocks.{i}." for i in range(single)]
    return [*blocks, "guidance_in."]


def sd3_config(tensors: Tensors) -> Config:
    """SD3Transformer2DModel's configuration as far as the shapes of Stability's tensors tell."""
    width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    norm = tensors.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = norm.shape[0] if norm else 64
    caption, joint = tensors["context_embedder.weight"].shape
    dual = {int(key.split(".")[1]) for key in tensors if ".attn2." in key}
    return {
        "_class_name": "SD3Transformer2DModel",
        "num_layers": count_blocks(tensors, "joint_blocks"),
        "dual_attention_layers": sorted(dual),
        "qk_norm": "rms_norm" if norm else None,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "caption_projection_dim": caption,
        "joint_attention_dim": joint,
        "pooled_projection_dim": tensors["y_embedder.mlp.0.weight"].shape[1],
        "in_channels": channels,
        "out_channels": tensors["final_layer.linear.weight"].shape[0] // patch**2,
        "patch_size": patch,
        "pos_embed_max_size": isqrt(tensors["pos_embed"].shape[1]),
    }


def sd3_hints(names: Iterable[str]) -> list[str]:
    """Stability's keys for as many blocks as there are among diffusers' `names`, each with all that it may have."""
    blocks = range(count_blocks(names, "transformer_blocks"))
    keys = [f"joint_blocks.{i}.x_block.{part}." for i in blocks for part in ("attn.ln_q", "attn2.qkv")]
    return [*keys, "context_embedder.weight"]


def count_blocks(names: Iterable[str], kind: str) -> int:
    """How many blocks `kind`.0, `kind`.1, … there are."""
    numbers = [name.split(".")[1] for name in names if name.startswith(f"{kind}.")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


FLUX = Layout(
    pipeline="FluxPipeline",
    key="double_blocks.0.img_attn.qkv.weight",
    convert=single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    hints=flux_hints,
    config=flux_config,
    published=lambda config: "flux.1-dev" if config["guidance_embeds"] else "flux.1-schnell",
    encoders={"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
)
SD3 = Layout(
    pipeline="StableDiffusion3Pipeline",
    key="joint_blocks.0.x_block.attn.qkv.weight",
    convert=single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers,
    hints=sd3_hints,
    config=sd3_config,
    published=lambda config: "sd3.5-medium" if config["dual_attention_layers"] else "sd3.5-large",
    encoders={"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
)
LAYOUTS = (FLUX, SD3)


@dataclass(frozen=True)
class SingleFile:
    """What one file holds: for each of diffusers' components, its tensors by the names that diffusers gives them.

    `pipeline` is diffusers' class, and `config` what the DiT's shapes say of its configuration; None and {} for a file
    with no DiT. `published` is the folder in export/configs whose values fill up the rest.
    """

    file: Path
    pipeline: str | None
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
            raise UserError(problem, "--base FOLDER, a diffusers folder of this model")
        return known | self.config


def open_single_file(file: Path) -> SingleFile:
    """Recognise what is in the safetensors file, by its keys. No weight is read.

    Raises UserError if nothing in it is known, if a tensor is lacking, or if one is left over in the DiT.
    """
    tensors = dequantised(open_tensors(file))
    components: dict[str, dict[str, Lazy]] = {}
    layout, prefix = find_dit(tensors)
    used: set[str] = set()
    config: Config = {}
    if layout:
        dit = without_prefix(tensors, prefix)
        if not prefix:  # nothing in front of the DiT's own keys: what else is in the file has prefixes
            others = ("text_encoders.", *filter(None, VAE_PREFIXES))
            dit = {key: tensor for key, tensor in dit.items() if not key.startswith(others)}
        components["transformer"] = convert_dit(layout, dit, file)
        config = read_config(layout, dit, file)
        used.update(prefix + key for key in dit)
    for name, folder in encoder_folders(layout, tensors).items():
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
    published = CONFIGS / layout.published(config) if layout else None
    return SingleFile(file, layout.pipeline if layout else None, components, config, published)


def require(single: SingleFile, needed: Iterable[str], base: Path | None) -> None:
    """Raise UserError, with the option that helps, if the file lacks a component of `needed` that `base` lacks too.

    `needed` are components as model_index.json names them: tokenizers too, which no such file holds.
    """
    missing = [name for name in needed if name not in single.components and not (base and (base / name).is_dir())]
    if missing:
        where = f"{single.file} has {', '.join(single.components)}"
        where += f", and {base} does not have the rest" if base else ""
        fix = "a diffusers folder of the model it was made from, which has them"
        raise UserError(f"{', '.join(missing)} missing: {where}", f"--base FOLDER, {fix}")


def find_dit(tensors: Tensors) -> tuple[Layout | None, str]:
    """The layout of the DiT among the tensors, and what stands before its keys; None where there is none."""
    for layout in LAYOUTS:
        for prefix in DIT_PREFIXES:
            if prefix + layout.key in tensors:
                return layout, prefix
    return None, ""


def encoder_folders(layout: Layout | None, tensors: Tensors) -> Mapping[str, str]:
    """Where diffusers has each text encoder: by the DiT, or without one by CLIP's bigG, which only one family has."""
    if layout:
        return layout.encoders
    return SD3.encoders if any(key.startswith("text_encoders.clip_g.") for key in tensors) else FLUX.encoders


def without_prefix(tensors: Tensors, prefix: str) -> dict[str, Lazy]:
    """The tensors behind the prefix, by their names without it."""
    return {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def convert_dit(layout: Layout, tensors: Tensors, file: Path) -> dict[str, Lazy]:
    """The DiT's tensors by diffusers' names. Raises UserError if one is lacking or left over."""
    recipes = {key: Recipe((Piece(key),), tensor.shape) for key, tensor in tensors.items()}
    try:
        converted = layout.convert(recipes)  # takes away what it uses
    except (KeyError, IndexError, ValueError) as error:  # not a KeyError where block numbers are missing or are none
        lacks = f"the tensor {error.args[0]}" if isinstance(error, KeyError) else "blocks with numbers"
        problem = f"{file} lacks {lacks} of the DiT of a {layout.pipeline}"
        raise UserError(problem, "copy the file again; a LoRA belongs behind --lora") from error
    if recipes:
        problem = f"{file} holds a DiT that is built otherwise: {shown(list(recipes))} have no place in it"
        raise UserError(problem, "use FLUX.1, Stable Diffusion 3.5 or a fine-tune of them")
    return {name: recipe.of(tensors) for name, recipe in converted.items()}


def read_config(layout: Layout, tensors: Tensors, file: Path) -> Config:
    """The DiT's configuration as far as shapes tell. Raises UserError for shapes that no such DiT has."""
    try:
        return layout.config(tensors)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        problem = f"the shapes in {file} are not those of the DiT of a {layout.pipeline}: {error}"
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
        raise UserError(problem, "--base FOLDER has the right one; leave this one out of the file")
    return {name: recipe.of(tensors) for name, recipe in converted.items()}


class _AnyKey(dict[str, Recipe]):
    """A checkpoint of which only the blocks are known: it has every key that a converter asks for."""

    def pop(self, key: str, *default: object) -> Recipe:
        return Recipe((Piece(key),))


def recipes_for(names: Iterable[str]) -> dict[str, Recipe]:
    """How a DiT with diffusers' `names` is made of its authors' tensors, by diffusers' names; {} for other names."""
    names = set(names)
    for layout in LAYOUTS:
        single = any(name.startswith("single_transformer_blocks.") for name in names)
        if single != (layout is FLUX) or not count_blocks(names, "transformer_blocks"):
            continue
        made_up = _AnyKey({key: Recipe((Piece(key),)) for key in layout.hints(names)})
        return {name: recipe for name, recipe in layout.convert(made_up).items() if name in names}
    return {}


def unknown(file: Path, tensors: Tensors) -> UserError:
    """Why nothing in the file can be used."""
    keys = list(tensors)
    if any(".lora_" in key or ".lora." in key for key in keys):
        return UserError(f"{file} is a LoRA, not a checkpoint", f"ditforge export CHECKPOINT --lora {file}:1.0")
    if any(key.startswith("transformer_blocks.") for key in keys):
        return UserError(f"{file} is one file of a diffusers folder", "give the folder that has model_index.json")
    known = "FLUX.1 (Black Forest Labs, ComfyUI) or Stable Diffusion 3.5 (Stability, ComfyUI)"
    return UserError(f"{file} is of no known layout: it has {shown(keys)}", f"use a file of {known}")


def shown(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "no tensors") + rest
