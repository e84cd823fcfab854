"""Models of other architectures, by the tensors in their files and by the pipelines in their folders: named, not read.

The tensors are those by which ComfyUI (comfy/model_detection.py) and diffusers (loaders/single_file_utils.py) tell the
architectures apart, in the names of the authors and of ComfyUI. FLUX.1 Kontext has the same tensors as FLUX.1 dev: only
its name or its folder's pipeline tells it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

PREFIXES = re.compile(r"((model|diffusion_model|transformer|net|dit|module|_orig_mod)\.)*")


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


CLIP_OF_OTHERS = "CLIP in OpenAI's or OpenCLIP's layout, and not in that of Hugging Face, which can be read"
T5_BIAS = r"(.*\.)?encoder\.block\.{}\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"
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
    Architecture("a text encoder of Wan (UMT5)", (T5_BIAS.format(0), T5_BIAS.format(1))),
    Architecture("a text encoder of Wan (UMT5)", (r"enc\.blk\.1\.attn_rel_b\.weight",)),
    Architecture(CLIP_OF_OTHERS, (r"(.*\.)?transformer\.resblocks\.0\.attn\.in_proj_weight",)),
    Architecture(CLIP_OF_OTHERS, (r"resblocks\.0\.attn\.in_proj_weight",)),
    Architecture("a network that reads pictures (SigLIP)", (r"vision_model\.head\.probe",)),
    Architecture("a language model", (r"(language_model\.(model\.)?)?layers\.0\.self_attn\.q_proj\.weight",)),
    Architecture("the autoencoder of FLUX.2", (r"(.*\.)?bn\.running_mean", r"(.*\.)?decoder\.conv_in\.weight")),
    Architecture("the autoencoder of Wan or Qwen-Image", (r"(.*\.)?decoder\.middle\.0\.residual\.0\.gamma",)),
    Architecture("a tiny autoencoder (TAESD)", (r"(.*\.)?(decoder\.)?(layers\.)?3\.conv\.0\.weight",)),
    Architecture("an upscaler of pictures", (r"(model\.1\.sub\.0\.RDB1|RRDB_trunk\.0\.RDB1|body\.0\.rdb1)\.conv1.*",)),
    Architecture("Kandinsky", (r"visual_transformer_blocks\.0\..*",), r"Kandinsky.*"),
    Architecture("Bria", (), r"Bria.*"),
    Architecture("Allegro", (), r"Allegro.*"),
    Architecture("Kolors", (), r"Kolors.*"),
)
# CLIP's first linear, as transformers 4 wrote it and as transformers 5 does.
CLIP_QUERIES = ("text_model.encoder.layers.0.self_attn.q_proj.weight", "encoder.layers.0.self_attn.q_proj.weight")
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
    if name := wide_sd3(sizes):
        return name
    return None


def wide_sd3(sizes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return what a DiT of Stable Diffusion 3 is that reads other channels than it writes; None if it is none."""
    read, written = sizes.get("x_embedder.proj.weight", ()), sizes.get("final_layer.linear.weight", ())
    if "joint_blocks.0.x_block.attn.qkv.weight" in sizes and len(read) == 4 and written:
        channels, patch = read[1], read[2]
        if channels * patch**2 != written[0]:
            return "Stable Diffusion 3 with a picture as input beside the noise"
    return None


def gguf_name(architecture: str) -> str | None:
    """Return what a model is that says this of itself in a GGUF file; None if it is one that can be read, or "".

    Some tools write other names for the same models, such as "pig", so that tensors are asked first.
    """
    if not architecture or architecture in ("flux", "sd3"):
        return None
    return GGUF_NAMES.get(architecture) or f"a model of the architecture {architecture!r}"


def pipeline_of(name: str) -> str | None:
    """Return the name of the architecture whose pipeline of diffusers is called `name`; None if it is not here."""
    return next(
        (known.name for known in ARCHITECTURES if known.pipelines and re.fullmatch(known.pipelines, name)), None
    )


def bare(name: str) -> str:
    """Return the name of a tensor without the prefixes before the names of the authors."""
    return PREFIXES.sub("", name, count=1)


def encoder_of(names: Iterable[str]) -> str | None:
    """Return what ComfyUI calls the text encoder that a file consists of, `t5xxl` or `clip`; None if it is none."""
    names = set(names)
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in names:
        return "t5xxl"
    return "clip" if names & set(CLIP_QUERIES) else None
