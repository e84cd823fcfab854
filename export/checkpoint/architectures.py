"""Models of other architectures, by the tensors in their files and by the pipelines in their folders: named, not read.

The tensors are those by which ComfyUI (comfy/model_detection.py) and diffusers (loaders/single_file_utils.py) tell the
architectures apart, in the names of the authors and of ComfyUI. FLUX.1 Kontext has the same tensors as FLUX.1 dev: only
its name or its folder's pipeline tells it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "net.", "transformer.")


@dataclass(frozen=True)
class Architecture:
    """An architecture that cannot be exported.

    name: what people call the model.
    keys: patterns of names of tensors, without prefix; a file of this architecture has all of them.
    pipelines: a pattern of the names of diffusers' pipelines.
    """

    name: str
    keys: tuple[str, ...] = ()
    pipelines: str = ""


# The first that fits is taken, so that what is built upon another architecture comes before that.
ARCHITECTURES = (
    Architecture("a ControlNet of FLUX.1", (r"(controlnet_.*|input_hint_block\.0\.weight)", r"double_blocks\.0\..*")),
    Architecture("a ControlNet", (r"(controlnet_.*|control_model\..*|control_(all_x_embedder|layers)\..*)",)),
    Architecture("an IP-Adapter", (r"(ip_adapter.*|image_proj(_model)?\..*|double_blocks\.0\.processor\.ip_.*)",)),
    Architecture("PuLID", (r"pulid_(encoder|ca)\..*",)),
    Architecture("FLUX.1 Redux", (r"redux_up\.weight",), r"FluxPriorRedux.*"),
    Architecture("Chroma", (r"distilled_guidance_layer\..*",), r"Chroma.*"),
    Architecture("FLUX.3", (r"early_stream_modulations\..*",), r"Flux3.*"),
    Architecture("FLUX.2", (r"double_stream_modulation_img\.lin\.weight",), r"Flux2.*"),
    Architecture("FLUX.2", (r"single_stream_modulation\.lin\.weight",)),
    Architecture(
        "HunyuanVideo", (r"txt_in\.individual_token_refiner\..*",), r"(HunyuanVideo|HunyuanSkyreels|SkyReels).*"
    ),
    Architecture("HunyuanImage", (r"double_blocks\.0\.img_attn_qkv\.weight",), r"HunyuanImage.*"),
    Architecture("FLUX.1 Kontext", (), r"FluxKontext.*"),
    Architecture("FLUX.1 Fill", (), r"FluxFill.*"),
    Architecture("FLUX.1 Canny or Depth", (), r"FluxControl(?!Net).*"),
    Architecture("Wan", (r"head\.modulation", r"blocks\.0\.self_attn\.q\.weight"), r"Wan.*"),
    Architecture(
        "Qwen-Image", (r"transformer_blocks\.0\.img_mlp\.net\.0\.proj\.weight", r"txt_norm\.weight"), r"QwenImage.*"
    ),
    Architecture("Qwen-Image", (r"txt_in\.text_norm\.weight",)),
    Architecture(
        "Z-Image", (r"(all_)?(x_embedder.*|cap_embedder\..*)", r"noise_refiner\.0\..*", r"x_pad_token"), r"ZImage.*"
    ),
    Architecture("Z-Image", (r"layers\.0\.adaLN_modulation\.0\.weight", r"noise_refiner\.0\..*", r"cap_pad_token")),
    Architecture("Lumina Image 2.0", (r"cap_embedder\.[01]\.weight", r"noise_refiner\.0\..*"), r"Lumina.*"),
    Architecture("Krea 2", (r"txtfusion\.projector\.weight",), r"Krea.*"),
    Architecture("HiDream", (r"double_stream_blocks\.0\.block\..*",), r"HiDream.*"),
    Architecture("AuraFlow", (r"double_layers\.0\.attn\.w1q\.weight",), r"AuraFlow.*"),
    Architecture("LTX-Video", (r"patchify_proj\.weight", r"adaln_single\.emb\.timestep_embedder\..*"), r"LTX.*"),
    Architecture("LTX-Video", (r"transformer_blocks\.0\.scale_shift_table", r"patchify_proj\.weight")),
    Architecture("Mochi", (r"t5_yproj\.weight",), r"Mochi.*"),
    Architecture("Mochi", (r"blocks\.0\.attn\.qkv_x\.weight",)),
    Architecture("Hunyuan-DiT", (r"mlp_t5\.0\.weight",), r"HunyuanDiT.*"),
    Architecture("Cosmos", (r"blocks\.block0\.blocks\.0\.block\.attn\.to_q\.0\.weight",), r"Cosmos.*"),
    Architecture("Cosmos Predict2", (r"x_embedder\.proj\.1\.weight", r"blocks\.0\.self_attn\.q_proj\.weight")),
    Architecture("Sana", (r"blocks\.0\.cross_attn\.q_linear\.weight", r"blocks\.0\.attn\.qkv\.weight"), r"Sana.*"),
    Architecture("PixArt", (r"blocks\.0\.cross_attn\.q_linear\.weight",), r"PixArt.*"),
    Architecture("PixArt", (r"adaln_single\.linear\.weight", r"pos_embed\.proj\.weight")),
    Architecture(
        "CogVideoX or CogView", (r"blocks\.0\.norm1\.linear\.weight", r"patch_embed\..*"), r"Cog(Video|View).*"
    ),
    Architecture("OmniGen", (r"time_token\.mlp\.0\.weight",), r"OmniGen.*"),
    Architecture("Stable Audio", (r"rotary_pos_emb\.inv_freq",), r"StableAudio.*"),
    Architecture("Stable Cascade", (r"clf\.1\.weight",), r"(StableCascade|Wuerstchen).*"),
    Architecture(
        "Stable Video Diffusion", (r"input_blocks\.1\.1\.time_stack\.0\.attn1\.to_q\.weight",), r"StableVideo.*"
    ),
    Architecture(
        "Stable Diffusion XL",
        (
            r"(conditioner\.embedders\..*|label_emb\.0\.0\.weight|add_embedding\.linear_1\.weight)",
            r"(input_blocks|down_blocks)\..*",
        ),
        r"StableDiffusionXL.*",
    ),
    Architecture("Stable Diffusion 2", (r"cond_stage_model\.model\..*", r"input_blocks\..*"), ""),
    Architecture(
        "Stable Diffusion 1 or 2",
        (r"(input_blocks|down_blocks)\..*", r"(output_blocks|up_blocks)\..*"),
        r"StableDiffusion(?!3).*",
    ),
    Architecture("Stable Diffusion 3 for pictures as input", (), r"StableDiffusion3(Img2Img|Inpaint|ControlNet|PAG).*"),
    Architecture("FLUX.1 for pictures as input", (), r"Flux(Img2Img|Inpaint|ControlNet).*"),
    Architecture("Kandinsky", (), r"Kandinsky.*"),
    Architecture("Bria", (), r"Bria.*"),
    Architecture("Allegro", (), r"Allegro.*"),
    Architecture("Kolors", (), r"Kolors.*"),
)
# What GGUF files name that are of none of these: `general.architecture`.
GGUF_NAMES = {
    "sd1": "Stable Diffusion 1 or 2",
    "sdxl": "Stable Diffusion XL",
    "aura": "AuraFlow",
    "hidream": "HiDream",
    "cosmos": "Cosmos",
    "ltxv": "LTX-Video",
    "hyvid": "HunyuanVideo",
    "wan": "Wan",
    "lumina2": "Lumina Image 2.0 or Z-Image",
    "qwen_image": "Qwen-Image",
    "chroma": "Chroma",
    "flux2": "FLUX.2",
    "z_image": "Z-Image",
}


def architecture_of(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return the name of the architecture that has tensors of these names and shapes; None if it is not known here."""
    names = {bare(name) for name in shapes}
    for known in ARCHITECTURES:
        if known.keys and all(any(re.fullmatch(key, name) for name in names) for key in known.keys):
            return known.name
    sizes = {bare(name): shape for name, shape in shapes.items()}
    read, written = sizes.get("img_in.weight", ()), sizes.get("final_layer.linear.weight", ())
    if "double_blocks.0.img_attn.qkv.weight" in names and len(read) == len(written) == 2 and read[1] != written[0]:
        named = {384: "Fill", 128: "Canny or Depth"}.get(read[1], "a variant")
        return f"FLUX.1 {named}, which takes a picture beside the noise"
    return None


def pipeline_of(name: str) -> str | None:
    """Return the name of the architecture whose pipeline of diffusers is called `name`; None if it is not here."""
    return next(
        (known.name for known in ARCHITECTURES if known.pipelines and re.fullmatch(known.pipelines, name)), None
    )


def bare(name: str) -> str:
    """Return the name of a tensor without the prefixes before the names of the authors."""
    return next((name[len(prefix) :] for prefix in PREFIXES if name.startswith(prefix)), name)


def encoder_of(names: Iterable[str]) -> str | None:
    """Return what ComfyUI calls the text encoder that a file consists of, `t5xxl` or `clip`; None if it is none."""
    names = set(names)
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in names:
        return "t5xxl"
    return "clip" if "text_model.encoder.layers.0.self_attn.q_proj.weight" in names else None
