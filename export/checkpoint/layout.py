"""How the authors of a family write its models into one file, and what other components of such a file are called.

Nothing here needs PyTorch, so that a file is recognised at once. Layouts are found by the entry points of the group
`ditforge.layouts`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ditforge import entry_points
from ditforge.export.checkpoint.variants import Variant

if TYPE_CHECKING:
    from ditforge.export.checkpoint.conversion import Recipe

# What can stand before the names of a DiT's tensors, any number of times: ComfyUI's names, and those of wrappers.
WRAPPERS = re.compile(r"((model|diffusion_model|transformer|net|dit|module|_orig_mod)\.)*")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
CLIP_G_WIDTH = 1280
VAE_KEY = "decoder.up.0.block.0.conv1.weight"
OWN_VAE_KEY = "decoder.up_blocks.0.resnets.0.conv1.weight"  # with diffusers' names
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
CLIP_KEY = "text_model.embeddings.position_embedding.weight"
PROJECTION = "text_projection"
# What many files hold beside the networks, and why no export needs it.
UNUSED = {
    re.compile(r"(.*\.)?logit_scale"): "only the training of CLIP needs it",
    re.compile(r"(.*\.)?position_ids"): "the positions count from 0 in any case",
    re.compile(r"(.*\.)?spiece_model"): "the tokenizers are read from the base",
    re.compile(r"(.*\.)?model_ema\..*"): "it is an average of the weights, which the training makes",
    re.compile(r"(.*\.)?denoiser\..*"): "it is the schedule of the training",
    re.compile(r"loss\..*"): "it is of the autoencoder's training",
}

Config = dict[str, Any]


class Shaped(Protocol):
    """A tensor of which only the shape is asked: read or not."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Layout:
    """How the authors of a family write its DiT into a file.

    pipeline, class_name: diffusers' classes of the pipeline and of the DiT, for example FluxPipeline.
    title: what people call the family's models.
    variants: the models of the family.
    key: the name of a tensor that only this layout has.
    own_key: diffusers' name of a tensor that only these models have.
    own_names: patterns at the start of diffusers' names, and the authors' names in their place, for config.
    convert: diffusers' converter from the authors' names to diffusers' names.
    hints: takes diffusers' names, and returns names in the authors' layout from which `convert` counts the blocks.
    defaults: what diffusers takes where the DiT's config.json lacks a field that tells the variants apart.
    config: takes the authors' tensors, and returns the part of the DiT's configuration that their shapes tell.
    names: takes that configuration, and returns the authors' names of all tensors of such a DiT.
    encoders: maps ComfyUI's name of each text encoder to diffusers' folder.
    projected: the text encoders, by ComfyUI's name, whose projection is the identity where a file lacks it.
    lora_encoders: maps each prefix in Kohya's LoRA files to diffusers' folder of the text encoder.
    lora_joint: maps the name that adapters have for several of diffusers' modules at once to these modules, in the
        order of their rows. {} stands for the number of the block.
    lora_optional: patterns of modules that not all models of the family have, as `transformer.block_0_part` without
        further dots, and why a checkpoint can do without what an adapter has for them.
    """

    pipeline: str
    class_name: str
    title: str
    variants: tuple[Variant, ...]
    key: str
    own_key: str
    own_names: tuple[tuple[str, str], ...]
    convert: Callable[[dict[str, Recipe]], dict[str, Recipe]]
    hints: Callable[[Iterable[str]], list[str]]
    defaults: Config
    config: Callable[[Mapping[str, Shaped]], Config]
    names: Callable[[Config], list[str]]
    encoders: Mapping[str, str]
    lora_encoders: Mapping[str, str]
    projected: tuple[str, ...] = ()
    lora_joint: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lora_optional: Mapping[str, str] = field(default_factory=dict)

    def find(self, names: Iterable[str]) -> tuple[str, bool] | None:
        """Return the prefix of the DiT's keys among the names, and whether they are diffusers' names; None if none."""
        names = list(names)
        for key, own in ((self.key, False), (self.own_key, True)):
            if (prefix := prefix_of(key, names)) is not None:
                return prefix, own
        return None

    def own_config(self, tensors: Mapping[str, Shaped]) -> Config:
        """Return what config() does, for tensors with diffusers' names."""
        named: dict[str, Shaped] = {}
        for name, tensor in tensors.items():
            for pattern, replacement in self.own_names:
                new, count = re.subn(pattern, replacement, name)
                if count:
                    named[new] = tensor
                    break
        return self.config(named)


def weights_and_biases(modules: Iterable[str]) -> list[str]:
    """Return the names of the weight and the bias of each module."""
    return [f"{module}.{parameter}" for module in modules for parameter in ("weight", "bias")]


def prefix_of(key: str, names: Iterable[str]) -> str | None:
    """Return what stands before `key` in one of the names, if it is nothing but WRAPPERS; None if there is no such."""
    starts = (name.removesuffix(key) for name in names if name.endswith(key))
    return max((start for start in starts if WRAPPERS.fullmatch(start)), key=len, default=None)


def count_blocks(names: Iterable[str], kind: str) -> int:
    """Count the blocks `kind`.0, `kind`.1, … among the names."""
    numbers = [name.split(".")[1] for name in names if name.startswith(f"{kind}.")]
    return max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)


def layouts() -> list[Layout]:
    """Return all installed layouts. Raises UserError for an entry point that does not name a Layout."""
    return entry_points.load_all(entry_points.LAYOUTS, Layout)


def known_models() -> str:
    """Return the titles of the families whose single files can be read, joined by "or"."""
    return " or ".join(layout.title for layout in layouts())


def find_vae(names: Container[str]) -> str | None:
    """Return the prefix of the autoencoder's keys among the names of a file's tensors; None if there is none."""
    return next((p for p in VAE_PREFIXES if p + VAE_KEY in names or p + OWN_VAE_KEY in names), None)


def encoder_keys(name: str, tensors: Iterable[str]) -> dict[str, str]:
    """Return the keys of the text encoder `name` in an all-in-one file, by their names in transformers' module.

    ComfyUI keeps the projection inside of `transformer`, and older versions kept it beside that.
    """
    prefix = f"text_encoders.{name}."
    inner = f"{prefix}transformer."
    keys = {key[len(inner) :]: key for key in tensors if key.startswith(inner)}
    beside = {key[len(prefix) :]: key for key in tensors if key.startswith(prefix + PROJECTION)}
    return {**beside, **keys}
