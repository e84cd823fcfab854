"""Models of other architectures: the names of tensors in published files, and the pipelines and keys of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import random_flux
import random_sd3
import single_files
import torch
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES
from safetensors.torch import save_file

from ditforge.errors import UserError
from ditforge.export.checkpoint.architectures import architecture_of, pipeline_of
from ditforge.export.checkpoint.description import describe_file
from ditforge.export.checkpoint.layouts import open_single_file
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.families import families, family_of

# Tensors of published files, by the authors' names.
FILES = {
    "Chroma": ["double_blocks.0.img_attn.qkv.weight", "distilled_guidance_layer.in_proj.weight"],
    "FLUX.2": ["double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"],
    "FLUX.1 Redux": ["redux_up.weight", "redux_down.weight"],
    "HunyuanVideo": [
        "double_blocks.0.img_attn.qkv.weight",
        "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1.bias",
    ],
    "a ControlNet of FLUX.1": ["double_blocks.0.img_attn.qkv.weight", "controlnet_blocks.0.weight"],
    "Wan": ["blocks.0.self_attn.q.weight", "head.modulation", "patch_embedding.weight"],
    "Qwen-Image": ["transformer_blocks.0.img_mlp.net.0.proj.weight", "txt_norm.weight", "img_in.weight"],
    "Z-Image": ["layers.0.adaLN_modulation.0.weight", "noise_refiner.0.attention.qkv.weight", "cap_pad_token"],
    "Lumina": ["cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight"],
    "HiDream": ["double_stream_blocks.0.block.adaLN_modulation.1.bias"],
    "AuraFlow": ["double_layers.0.attn.w1q.weight", "positional_encoding", "cond_seq_linear.weight"],
    "LTX-Video": ["patchify_proj.weight", "adaln_single.emb.timestep_embedder.linear_1.bias"],
    "Mochi": ["t5_yproj.weight"],
    "Hunyuan-DiT": ["mlp_t5.0.weight", "blocks.0.attn1.Wqkv.weight"],
    "Cosmos": ["blocks.block0.blocks.0.block.attn.to_q.0.weight"],
    "Sana": ["blocks.0.cross_attn.q_linear.weight", "blocks.0.attn.qkv.weight"],
    "PixArt": ["adaln_single.linear.weight", "pos_embed.proj.weight"],
    "Stable Diffusion XL": ["input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.bias", "label_emb.0.0.weight"],
    "Stable Diffusion 1": ["input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.bias"],
}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name", FILES)
def test_single_files(name: str, prefix: str, tmp_path: Path) -> None:
    save_file({prefix + key: torch.zeros(2, 2) for key in FILES[name]}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"is {name}.*, which cannot be exported[\s\S]*use FLUX.1 or") as error:
        open_single_file(tmp_path / "a.safetensors")
    assert str(tmp_path) in error.value.problem


@pytest.mark.parametrize(("channels", "name"), [(384, "Fill"), (128, "Canny or Depth"), (96, "a variant")])
def test_flux_with_a_picture_as_input(channels: int, name: str, tmp_path: Path) -> None:
    tensors = single_files.flux_dit(random_flux.schnell().transformer.state_dict())
    tensors["img_in.weight"] = torch.zeros(tensors["img_in.weight"].shape[0], channels)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=f"FLUX.1 {name}"):
        open_single_file(tmp_path / "a.safetensors")


def test_stable_diffusion_3_with_a_picture_as_input(tmp_path: Path) -> None:
    tensors = single_files.sd3_dit(random_sd3.medium().transformer.state_dict())
    read = tensors["x_embedder.proj.weight"]
    tensors["x_embedder.proj.weight"] = torch.cat([read, read, read[:, :1]], 1)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="Stable Diffusion 3 with a picture as input"):
        open_single_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ([f"encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias.weight" for i in range(3)], "UMT5"),
        (["transformer.resblocks.0.attn.in_proj_weight", "positional_embedding"], "CLIP in OpenAI's"),
        (["vision_model.head.probe"], "SigLIP"),
        (["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"], "a language model"),
        (["language_model.model.layers.0.self_attn.q_proj.weight"], "a language model"),
        (["bn.running_mean", "decoder.conv_in.weight"], "the autoencoder of FLUX.2"),
        (["decoder.middle.0.residual.0.gamma"], "the autoencoder of Wan"),
        (["decoder.layers.3.conv.0.weight"], "a tiny autoencoder"),
    ],
)
def test_components_of_other_models(keys: list[str], name: str, tmp_path: Path) -> None:
    """They are named, by `export` and by `inspect`, and not called damaged."""
    file = tmp_path / "a.safetensors"
    save_file({key: torch.zeros(2, 2) for key in keys}, file)
    with pytest.raises(UserError, match=name):
        open_single_file(file)
    found = describe_file(file)
    assert name in found.what and found.fix and not found.export


@pytest.mark.parametrize("name", ["chroma", "flux2", "flux3", "hunyuan-video", "mochi-1-preview", "hidream", "krea2"])
def test_keys_by_which_diffusers_tells_an_architecture(name: str) -> None:
    keys = CHECKPOINT_KEY_NAMES[name]
    assert any(architecture_of({key: (2, 2)}) for key in ([keys] if isinstance(keys, str) else keys))


def test_our_own_files_are_of_no_other_architecture() -> None:
    for dit in (
        single_files.flux_dit(random_flux.schnell().transformer.state_dict()),
        single_files.sd3_dit(random_sd3.medium().transformer.state_dict()),
        single_files.sd3_dit(random_sd3.large().transformer.state_dict()),
    ):
        assert architecture_of({key: tuple(tensor.shape) for key, tensor in dit.items()}) is None


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("FluxKontextPipeline", "FLUX.1 Kontext"),
        ("FluxFillPipeline", "FLUX.1 Fill"),
        ("FluxControlPipeline", "Canny or Depth"),
        ("ChromaPipeline", "Chroma"),
        ("Flux2Pipeline", "FLUX.2"),
        ("QwenImagePipeline", "Qwen-Image"),
        ("ZImagePipeline", "Z-Image"),
        ("StableDiffusionXLPipeline", "Stable Diffusion XL"),
        ("StableDiffusionPipeline", "Stable Diffusion 1 or 2"),
        ("WanPipeline", "Wan"),
        ("HunyuanVideoPipeline", "HunyuanVideo"),
        ("FluxPriorReduxPipeline", "Redux"),
    ],
)
def test_folders(pipeline: str, name: str, tmp_path: Path) -> None:
    assert hasattr(diffusers, pipeline)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(UserError, match=rf"{pipeline} \(.*{name}.*\), which cannot be exported"):
        family_of(open_files(CheckpointSource(tmp_path)))


@pytest.mark.parametrize(
    ("name", "metadata"),
    [("flux1-dev-kontext_fp8.safetensors", None), ("a.safetensors", {"modelspec.title": "FLUX.1 Kontext [dev]"})],
)
def test_kontext_is_only_told_by_words(name: str, metadata: dict[str, str] | None, tmp_path: Path) -> None:
    tensors = single_files.flux_dit(random_flux.schnell().transformer.state_dict())
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / name, metadata)
    report = LoadReport()
    open_single_file(tmp_path / name, report)
    assert "speak of Kontext" in report.unexpected[0].what


def test_our_own_pipelines_are_of_no_other_architecture() -> None:
    assert not any(pipeline_of(family.pipeline) for family in families())
