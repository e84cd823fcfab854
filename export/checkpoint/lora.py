"""LoRAs, added to the weights when these are read: W + strength * alpha / rank * up @ down (arXiv:2106.09685).

The names in a LoRA file can be those of diffusers and PEFT, those of Kohya's scripts and OneTrainer, or those of the
modules of Black Forest Labs and Stability, with or without a prefix. A LoRA for a fused weight (`qkv`, `linear1`) is
cut along its rows in the same way as the weight itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ditforge.errors import UserError
from ditforge.export.checkpoint.conversion import Piece, Recipe, Tensors
from ditforge.export.checkpoint.layouts import Layout, recipes_for
from ditforge.export.checkpoint.lazy_tensors import Lazy, open_tensors
from ditforge.export.checkpoint.load_report import shown
from ditforge.export.checkpoint.weights import safetensors_file

DIT = "transformer"
DIT_PREFIXES = ("", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.")
DIT_UNDERSCORED = ("lora_unet_", "lora_transformer_")
WEIGHT = ".weight"
PART = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_A|lora_down|lora\.down)|(?P<up>lora_B|lora_up|lora\.up))"
    r"(\.default)?\.weight|(?P<scaled>.+)\.alpha"
)
# Adapters that are not plain LoRAs, recognised by the ends of their keys.
OTHER_KINDS = (
    (r"\.hada_w\d_[ab]|\.hada_t\d", "a LoHa"),
    (r"\.lokr_(w\d(_[ab])?|t\d)", "a LoKr"),
    (r"\.dora_scale|\.lora_magnitude_vector(\..*)?", "a DoRA"),
    (r"\.oft_(blocks|diag|R\.weight)|\.boft_.*", "an OFT"),
    (r"\.processor\..*_lora\d?\.(down|up)\.weight", "a LoRA of XLabs' attention processors"),
    (r"\.(diff|diff_b)", "a difference of whole weights"),
    (r"(controlnet_.*|.*\.(lora_B|lora_up)\.bias)", "a control LoRA or ControlNet"),
)
METADATA_KEY = "lora_adapter_metadata"  # diffusers writes PEFT's configuration under this key of a file's metadata


@dataclass
class Pair:
    """The tensors that a LoRA file has for one module: down [rank, in…], up [out, rank, …] and alpha []."""

    down: Lazy | None = None
    up: Lazy | None = None
    alpha: Lazy | None = None


@dataclass(frozen=True)
class Target:
    """One of diffusers' weights that a LoRA's module changes. `recipe` cuts the rows of this weight from `up`."""

    component: str
    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Addition:
    """A LoRA's addition to one weight: scale * up @ down."""

    up: Lazy
    down: Lazy
    scale: float


Additions = dict[tuple[str, str], list[Addition]]  # the additions to each weight, by its component and name


def fuse(
    components: Mapping[str, Tensors], loras: Sequence[tuple[Path, float]], layout: Layout | None
) -> dict[str, dict[str, Lazy]]:
    """Return the components with LoRAs added. The sums are computed in float32 when a tensor is read.

    components: the DiT (`transformer`) and the text encoders, each with its tensors by diffusers' names. Tensors that
        no LoRA changes stay as they are.
    loras: the LoRA files, each with its strength.
    layout: has the names that the authors of the DiT's family use; if it is None, only diffusers' names are known.

    Raises UserError for a file that is not a plain LoRA, has keys or shapes that do not fit this model, has only one
    of the two matrices of a pair, or says twice how a pair is scaled.
    """
    targets = spellings(components, layout)
    found: Additions = {}
    for file, strength in loras:
        read_lora(file, strength, components, targets, found)
    fused = {component: dict(tensors) for component, tensors in components.items()}
    for (component, name), additions in found.items():
        fused[component][name] = added(fused[component][name], additions)
    return fused


def added(weight: Lazy, additions: Sequence[Addition]) -> Lazy:
    """Return the weight with the additions, in float32, unread."""

    def read(start: int, stop: int) -> torch.Tensor:
        total = weight.read_rows(start, stop).float()
        for addition in additions:
            up = addition.up.read_rows(start, stop).float().flatten(1)
            product = up @ addition.down.read().float().flatten(1)
            total += addition.scale * product.reshape(total.shape)
        return total

    return weight.each_row(read, torch.float32)


def read_lora(
    file: Path,
    strength: float,
    components: Mapping[str, Tensors],
    targets: Mapping[str, list[Target]],
    found: Additions,
) -> None:
    """Read a LoRA file and append its additions to `found`. Raises UserError as fuse() does.

    `targets` is what spellings() returned.
    """
    tensors = open_tensors(file)
    check_kind(file, tensors)
    if not tensors:
        raise UserError(f"{file} holds no tensors, and so no LoRA", "copy the file again, or leave it out")
    pairs, strange = parse_keys(tensors)
    strange += [module for module in pairs if module not in targets]
    if strange or not pairs:
        problem = f"{file}: {shown(sorted(strange))} fit nothing in this checkpoint: a LoRA of another model, or none"
        raise UserError(problem, "use a LoRA that was made for this model, or leave it out")
    settings = read_settings(file)
    for module, pair in pairs.items():
        if pair.up is None or pair.down is None:
            lost = "up" if pair.up is None else "down"
            raise UserError(f"{file}: {module} has no {lost} matrix", "copy the file again")
        rank = pair.down.length
        if not rank or (pair.alpha and prod(pair.alpha.shape) != 1):
            raise UserError(f"{file}: {module} has a rank of 0, or not one alpha", "copy the file again")
        if pair.alpha and settings.config(module).get("use_rslora"):
            problem = f"{file}: {module} has an alpha, and {METADATA_KEY} in the header has use_rslora"
            raise UserError(f"{problem}: which of the two scales is meant is not known", "keep one of them in the file")
        scale = strength * settings.scale(module, rank, pair.alpha)
        for target in targets[module]:
            weight = components[target.component][target.name]
            fits = pair.up.shape[1:2] == (rank,) and prod(pair.down.shape[1:]) == prod(weight.shape[1:])
            rows = pair.up.length * sum((p.stop - p.start for p in target.recipe.pieces), start=0)
            if not fits or rows != weight.length:
                sizes = f"{list(pair.up.shape)} times {list(pair.down.shape)}"
                problem = (
                    f"{file}: {module} is {sizes}, and {target.name} is {list(weight.shape)}: a LoRA of another model"
                )
                raise UserError(problem, "use a LoRA that was made for this model, or leave it out")
            up = target.recipe.of({target.recipe.pieces[0].name: pair.up})
            found.setdefault((target.component, target.name), []).append(Addition(up, pair.down, scale))


def check_kind(file: Path, keys: Iterable[str]) -> None:
    """Raise UserError if the keys show that the file is an adapter of another kind, which cannot be added."""
    for key in keys:
        for pattern, kind in OTHER_KINDS:
            if re.search(f"({pattern})$", key):
                problem = f"{file} is {kind}, which is not added here: it holds {key}"
                raise UserError(problem, "use a plain LoRA for this model, or merge it into a checkpoint first")


def parse_keys(tensors: Tensors) -> tuple[dict[str, Pair], list[str]]:
    """Return the pairs by the name that the file gives to their module, and the keys that belong to no pair."""
    pairs: dict[str, Pair] = {}
    strange = []
    for key, tensor in tensors.items():
        match = PART.fullmatch(key)
        if not match:
            strange.append(key)
            continue
        pair = pairs.setdefault(match["module"] or match["scaled"], Pair())
        if match["down"]:
            pair.down = tensor
        elif match["up"]:
            pair.up = tensor
        else:
            pair.alpha = tensor
    return pairs, strange


def spellings(components: Mapping[str, Tensors], layout: Layout | None) -> dict[str, list[Target]]:
    """Map every name that a LoRA file may use for a module to the weights that this module has in diffusers."""
    found: dict[str, list[Target]] = {}

    def add(spelling: str, target: Target) -> None:
        known = found.setdefault(spelling, [])
        if target.name not in {other.name for other in known}:  # some modules have one name in both layouts
            known.append(target)

    for component, tensors in components.items():
        for name in tensors:
            if not name.endswith(WEIGHT):
                continue
            module = name.removesuffix(WEIGHT)
            for spelling in dit_names(module) if component == DIT else encoder_names(component, module, layout):
                add(spelling, Target(component, name, Recipe((Piece(name),))))
    recipes = recipes_for(layout, components[DIT]) if layout and DIT in components else {}
    for name, recipe in recipes.items():
        source = recipe.pieces[0].name
        if name.endswith(WEIGHT) and source.endswith(WEIGHT):
            for spelling in dit_names(source.removesuffix(WEIGHT)):
                add(spelling, Target(DIT, name, recipe))
    return found


def dit_names(module: str) -> Iterable[str]:
    """Return all names that LoRA files use for a module of the DiT."""
    yield from (prefix + module for prefix in DIT_PREFIXES)
    yield from (prefix + module.replace(".", "_") for prefix in DIT_UNDERSCORED)


def encoder_names(component: str, module: str, layout: Layout | None) -> Iterable[str]:
    """Return all names that LoRA files use for a module of a text encoder."""
    bare = module.removeprefix("text_model.")
    kohya = [prefix for prefix, folder in layout.lora_encoders.items() if folder == component] if layout else []
    for written in (bare, f"text_model.{bare}"):
        yield f"{component}.{written}"
        yield from (prefix + written.replace(".", "_") for prefix in kohya)


@dataclass(frozen=True)
class Settings:
    """PEFT's configuration of each component, which diffusers writes into the file; empty if the file has none."""

    of: Mapping[str, Mapping[str, Any]]

    def config(self, module: str) -> Mapping[str, Any]:
        """The configuration of the component that has the module."""
        return self.of.get(module.partition(".")[0], {})

    def scale(self, module: str, rank: int, alpha: Lazy | None) -> float:
        """Return alpha / rank, the factor of the module's product.

        `alpha` is the file's tensor. If it is None, alpha is from PEFT's configuration, or else is the rank. In this
        case, the result is alpha / sqrt(rank) if the configuration has `use_rslora`.
        """
        if alpha is not None:
            return float(alpha.read().float().reshape(-1)[0]) / rank
        config, name = self.config(module), module.partition(".")[2]
        number = float(config.get("lora_alpha", rank))
        for pattern, value in (config.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):  # as PEFT matches them
                number = float(value)
        return number / (rank**0.5 if config.get("use_rslora") else rank)


def read_settings(file: Path) -> Settings:
    """Read PEFT's configuration from the file's metadata. Raises UserError if it is damaged."""
    with safetensors_file(file, "np") as opened:
        text = (opened.metadata() or {}).get(METADATA_KEY, "{}")
    found: dict[str, dict[str, Any]] = {}
    try:
        for key, value in json.loads(text).items():
            component, _, option = key.partition(".")
            found.setdefault(component, {})[option] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: {METADATA_KEY} in its header is damaged: {error}", "copy the file again") from error
    return Settings(found)
