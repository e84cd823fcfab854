"""What an adapter's file is, from its header alone: for `ditforge inspect`, without the checkpoint it belongs to."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters import keys
from ditforge.export.checkpoint.adapters.settings import ALPHAS, Settings, read_settings
from ditforge.export.checkpoint.weights import Stored, read_header

# The place of the rank in the shape of a part: the rows of `down`, the columns of LoKr's first factors, …
RANKS = {"lora_down": 0, "hada_w1_b": 0, "lokr_w1_b": 0, "lokr_w2_b": 0}
# What the names of modules show of the tool, the first pattern that fits one of them wins.
SPELLINGS = tuple(
    (re.compile(pattern), tool)
    for pattern, tool in (
        (r".*\.processor\.\w+_lora\d?", "XLabs"),
        (r"lora_transformer_.*", "OneTrainer"),
        (r"lycoris_.*", "LyCORIS"),
        (r"lora_(unet|te\d?)_.*", "Kohya's sd-scripts, or a tool with their names"),
        (r"(diffusion_model|text_encoders)\..*", "ComfyUI, ai-toolkit, or a tool with their names"),
        (r"(.*\.)?base_model\.model\..*", "PEFT"),
        (r"(transformer|unet|text_encoder(_\d)?)\..*", "diffusers"),
    )
)
ENCODERS = re.compile(
    r"(lora_|lycoris_|text_encoders[._])*(?P<name>te\d?|text_encoder(_\d)?|clip_[lgh]|t5(xxl)?)[._].*"
)
# What the names of modules show of the network, most special first. They are compared without dots.
NETWORKS = tuple(
    (re.compile(pattern), network)
    for pattern, network in (
        (r".*(distilled_guidance_layer|double_blocks_\d+_.*chroma).*", "Chroma"),
        (r".*(double_stream_modulation|single_stream_modulation|to_qkv_mlp_proj).*", "FLUX.2"),
        (r".*(individual_token_refiner|double_blocks_\d+_img_attn_qkv_proj|txt_in_c_embedder).*", "HunyuanVideo"),
        (
            r".*(context_refiner|noise_refiner|cap_embedder).*|.*(?<!transformer_)layers_\d+_attention_.*",
            "Z-Image or Lumina 2",
        ),
        (r".*transformer_blocks_\d+_(img|txt)_(mod|mlp)_.*", "Qwen-Image"),
        (r".*(?<!_)blocks_\d+_(self_attn|cross_attn|ffn)_.*", "Wan"),
        (
            r".*(input_blocks|output_blocks|middle_block|down_blocks|up_blocks|mid_block)_.*",
            "Stable Diffusion 1, 2 or XL",
        ),
        (
            r".*(double_blocks|single_blocks|single_transformer_blocks)_\d+_.*",
            "FLUX.1, or a model that is built like it",
        ),
        (r".*(joint_blocks)_\d+_.*", "Stable Diffusion 3 or 3.5"),
        (
            r".*transformer_blocks_\d+_(attn|attn2|ff|ff_context|norm1|norm1_context)_.*",
            "FLUX.1 or Stable Diffusion 3.5",
        ),
    )
)


@dataclass(frozen=True)
class AdapterDescription:
    """What an adapter's file says of itself.

    kinds: how many modules have each kind of adapter. ranks, alphas: how many modules have each rank, and each alpha of
    those that are written anywhere. spelling: the tool whose names the modules have. network: the models whose
    modules have such names. components: how many modules each component has; encoders have the names of the file.
    modules: the names of all modules. strange: keys of no known form. settings: PEFT's configuration and the metadata.
    """

    file: Path
    kinds: Mapping[str, int]
    ranks: Mapping[int, int]
    alphas: Mapping[float, int]
    spelling: str
    network: str
    components: Mapping[str, int]
    modules: tuple[str, ...]
    strange: tuple[str, ...]
    settings: Settings


def describe_adapter(file: Path) -> AdapterDescription:
    """Describe the adapter in the file. Only the header and scalars are read.

    Raises UserError as keys.grouped() and read_settings() do: for a file that is damaged, is no adapter, or is one of
    a kind that cannot be merged, which the error names.
    """
    modules, strange = keys.grouped(file, read_header(file))
    settings = read_settings(file)
    ranks, alphas = Counter[int](), Counter[float]()
    for module, parts in modules.items():
        rank = next((parts[part].shape[at] for part, at in RANKS.items() if part in parts and parts[part].shape), None)
        if rank is not None:
            ranks[rank] += 1
        alpha = scalar(parts["alpha"]) if "alpha" in parts else configured(settings, component(module))
        if alpha is not None:
            alphas[alpha] += 1
    return AdapterDescription(
        file,
        kinds=Counter(keys.kind_of(parts) for parts in modules.values()),
        ranks=dict(sorted(ranks.items())),
        alphas=dict(sorted(alphas.items())),
        spelling=first(SPELLINGS, modules) or "no prefix, as some tools write them",
        network=network_of(modules) or "no known model",
        components=Counter(component(module) for module in modules),
        modules=tuple(modules),
        strange=tuple(strange),
        settings=settings,
    )


def network_of(modules: Iterable[str]) -> str | None:
    """Return the models whose modules have such names; None if no known model has."""
    return first(NETWORKS, (name.replace(".", "_") for name in modules))


def component(module: str) -> str:
    """Return the component that a module's name means: `transformer`, or the name that the file has for an encoder."""
    match = ENCODERS.fullmatch(module)
    return match["name"] if match else "transformer"


def first(patterns: Iterable[tuple[re.Pattern[str], str]], names: Iterable[str]) -> str | None:
    """Return what the first pattern means that fits one of the names; None if none does."""
    names = list(names)
    return next((meaning for pattern, meaning in patterns if any(pattern.fullmatch(name) for name in names)), None)


def configured(settings: Settings, part: str) -> float | None:
    """Return the alpha that PEFT's configuration has for the component, without its patterns; None if it has none."""
    config: Mapping[str, Any] = settings.config(part)
    found = next((config[name] for name in ALPHAS if name in config), None)
    return float(found) if isinstance(found, int | float) else None


def scalar(stored: Stored) -> float:
    """Read a tensor of one number. Raises UserError if it has several."""
    if any(size != 1 for size in stored.shape):
        raise UserError(
            f"{stored.file}: {stored.name} has not one alpha, but {list(stored.shape)}", "copy the file again"
        )
    return float(stored.read().float().reshape(-1)[0])
