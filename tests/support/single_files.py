"""Checkpoints in one file, written from diffusers' modules: the inverse of what export/checkpoint/layouts.py reads.

The names are those of black-forest-labs/flux (modules/layers.py, modules/autoencoder.py), Stability-AI/sd3.5
(mmditx.py) and ComfyUI (comfy/supported_models.py), written down here independently of diffusers' converters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

SCALE = 0.0137  # of float8 weights: no power of two
Tensors = dict[str, Tensor]

FLUX_NAMES = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
}
FLUX_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
}
FLUX_DOUBLE_NORMS = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
FLUX_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
FLUX_SINGLE = {"norm.linear": "modulation.lin", "proj_out": "linear2"}
FLUX_SINGLE_NORMS = {"attn.norm_q": "norm.query_norm", "attn.norm_k": "norm.key_norm"}
FLUX_SINGLE_FUSED = {"linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}

SD3_NAMES = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
SD3_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}


def flux_dit(state: Mapping[str, Tensor]) -> Tensors:
    """FluxTransformer2DModel's tensors by BFL's names."""
    left, written = dict(state), {}
    rename(left, written, "", "", FLUX_NAMES)
    swap(left, written, "norm_out.linear", "final_layer.adaLN_modulation.1")
    for i in range(blocks(state, "transformer_blocks")):
        names = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        rename(left, written, *names, FLUX_DOUBLE)
        rename(left, written, *names, FLUX_DOUBLE_NORMS, {"weight": "scale"})
        fuse(left, written, *names, FLUX_FUSED)
    for i in range(blocks(state, "single_transformer_blocks")):
        names = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        rename(left, written, *names, FLUX_SINGLE)
        rename(left, written, *names, FLUX_SINGLE_NORMS, {"weight": "scale"})
        fuse(left, written, *names, FLUX_SINGLE_FUSED)
    assert not left, sorted(left)
    return written


def sd3_dit(state: Mapping[str, Tensor]) -> Tensors:
    """SD3Transformer2DModel's tensors by Stability's names."""
    left, written = dict(state), {}
    written["pos_embed"] = left.pop("pos_embed.pos_embed")
    rename(left, written, "", "", SD3_NAMES)
    swap(left, written, "norm_out.linear", "final_layer.adaLN_modulation.1")
    last = blocks(state, "transformer_blocks") - 1
    swap(
        left,
        written,
        f"transformer_blocks.{last}.norm1_context.linear",
        f"joint_blocks.{last}.context_block.adaLN_modulation.1",
    )
    for i in range(last + 1):
        names = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        rename(left, written, *names, SD3_BLOCK)
        fuse(left, written, *names, SD3_FUSED)
    assert not left, sorted(left)
    return written


def autoencoder(state: Mapping[str, Tensor]) -> Tensors:
    """AutoencoderKL's tensors as BFL and Stability write them; the attention's linears are 1x1 convolutions there."""
    levels, written = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("decoder.up_blocks.")), {}
    for key, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        for ours, theirs in (
            ("down_blocks.", "down."),
            (".resnets.", ".block."),
            (".conv_shortcut.", ".nin_shortcut."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
            ("conv_norm_out", "norm_out"),
            ("mid_block.attentions.0.group_norm", "mid.attn_1.norm"),
            ("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out"),
            ("mid_block.attentions.0.to_", "mid.attn_1."),
        ):
            name = name.replace(ours, theirs)
        written[name] = tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    return written


def text_model(state: Mapping[str, Tensor]) -> Tensors:
    """CLIP's tensors as transformers 4 wrote them, and ComfyUI does."""
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": tensor
        for key, tensor in state.items()
    }


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors behind the prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def make_float8(module: nn.Module, scale: float = SCALE) -> None:
    """Round the module's matrices to numbers that are float8 times the scale."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.copy_((parameter / scale).to(torch.float8_e4m3fn).float() * scale)


def in_float8(tensors: Mapping[str, Tensor], scale: float = SCALE, scale_name: str = "scale_weight") -> Tensors:
    """What make_float8 has rounded, as float8, each matrix with its scale; with a scale of 1, none is written."""
    written: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            written[name] = tensor
            continue
        written[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if scale != 1:
            written[name.removesuffix("weight") + scale_name] = torch.tensor(scale)
    return written


def write_holes(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a file of that size in which every number is a hole: it takes no room, so tensors may be on `meta`."""
    kinds = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": kinds[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(content).to_bytes(8, "little") + content)
        opened.truncate(8 + len(content) + offset)


def blocks(state: Mapping[str, Tensor], kind: str) -> int:
    """How many blocks of a kind there are."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{kind}.")})


def rename(
    left: Tensors,
    written: Tensors,
    ours: str,
    theirs: str,
    names: Mapping[str, str],
    parts: Mapping[str, str] | None = None,
) -> None:
    """Move what is there of weights and biases from `left` to `written`."""
    for name, other in names.items():
        for part, called in (parts or {"weight": "weight", "bias": "bias"}).items():
            if f"{ours}{name}.{part}" in left:
                written[f"{theirs}{other}.{called}"] = left.pop(f"{ours}{name}.{part}")


def fuse(left: Tensors, written: Tensors, ours: str, theirs: str, names: Mapping[str, tuple[str, ...]]) -> None:
    """Move several linears that read the same into one, where they are there."""
    for fused, parts in names.items():
        for kind in ("weight", "bias"):
            if f"{ours}{parts[0]}.{kind}" in left:
                written[f"{theirs}{fused}.{kind}"] = torch.cat([left.pop(f"{ours}{part}.{kind}") for part in parts])


def swap(left: Tensors, written: Tensors, ours: str, theirs: str) -> None:
    """Move a modulation: diffusers has scale and shift, the authors shift and scale."""
    for kind in ("weight", "bias"):
        scale, shift = left.pop(f"{ours}.{kind}").chunk(2)
        written[f"{theirs}.{kind}"] = torch.cat([shift, scale])
