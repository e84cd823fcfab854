"""The names that tools give to modules, mapped to the weights of FLUX and Stable Diffusion 3.5."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux
import random_sd3
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
from merged import lazily, merged, stored
from torch import nn

from ditforge.export.checkpoint.adapters.names import Index, index
from ditforge.export.checkpoint.layout import Layout
from ditforge.export.families.flux_layout import LAYOUT as FLUX
from ditforge.export.families.sd3_layout import LAYOUT as SD3

QKV = tuple(f"transformer_blocks.0.attn.to_{part}.weight" for part in "qkv")
TO_Q, CLIP, T5 = QKV[0], "encoder.layers.1.self_attn.q_proj.weight", "encoder.block.0.layer.0.SelfAttention.q.weight"
FLUX_NAMES = [
    *(
        (f"{prefix}transformer_blocks.0.attn.to_q", "transformer", (TO_Q,))
        for prefix in (
            "",
            "transformer.",
            "transformer.base_model.model.",
            "base_model.model.transformer.",
            "base_model.model.",
            "base_model.model.model.",
            "diffusion_model.",
            "model.diffusion_model.",
            "model.",
            "module.",
            "_orig_mod.",
            "transformer._orig_mod.",
            "unet.",
            "lora_unet_",
            "lora_transformer_",
            "lycoris_",
            "lora_unet_transformer_",
        )
    ),
    ("lycoris_transformer_blocks_0_attn_to_q", "transformer", (TO_Q,)),
    ("lora_transformer_transformer_blocks_0_attn_to_q", "transformer", (TO_Q,)),
    ("lora_unet_double_blocks_0_img_attn_qkv", "transformer", QKV),
    ("diffusion_model.double_blocks.0.img_attn.qkv", "transformer", QKV),
    ("base_model.model.double_blocks.0.img_attn.qkv", "transformer", QKV),
    ("lycoris_double_blocks_0_img_attn_qkv", "transformer", QKV),
    ("transformer.transformer_blocks.0.attn.to_qkv", "transformer", QKV),
    ("double_blocks.0.processor.qkv_lora1", "transformer", QKV),
    ("transformer.double_blocks.0.img_attn.qkv.1", "transformer", (QKV[1],)),  # OneTrainer and OMI
    (
        "lora_transformer_single_transformer_blocks_2_proj_mlp",
        "transformer",
        ("single_transformer_blocks.2.proj_mlp.weight",),
    ),
    ("transformer.single_blocks.2.linear1.3", "transformer", ("single_transformer_blocks.2.proj_mlp.weight",)),
    ("lora_unet_final_layer_linear", "transformer", ("proj_out.weight",)),
    ("lora_unet_proj_out_", "transformer", ("proj_out.weight",)),
    ("net.final_layer.linear", "transformer", ("proj_out.weight",)),
    ("pipe.transformer.proj_out", "transformer", ("proj_out.weight",)),
    ("oft_unet_final_layer_linear", "transformer", ("proj_out.weight",)),
    ("diffusion_model.final_layer_linear", "transformer", ("proj_out.weight",)),
    ("lora_unet_time_in_in_layer", "transformer", ("time_text_embed.timestep_embedder.linear_1.weight",)),
    *(
        (f"{prefix}encoder.layers.1.self_attn.q_proj", "text_encoder", (CLIP,))
        for prefix in (
            "text_encoder.text_model.",
            "text_encoder.",
            "text_encoder.base_model.model.text_model.",
            "text_encoders.clip_l.transformer.text_model.",
            "text_encoders.clip_l.text_model.",
            "clip_l.transformer.text_model.",
            "clip_l.text_model.",
            "te1.text_model.",
            "lora_te1.text_model.",
            "lora_te_text_model_",
            "lora_te1_text_model_",
            "lycoris_te1_text_model_",
            "text_model.",
            "base_model.model.text_model.",
        )
    ),
    *(
        (f"{prefix}encoder.block.0.layer.0.SelfAttention.q", "text_encoder_2", (T5,))
        for prefix in (
            "text_encoder_2.",
            "text_encoder_2.base_model.model.",
            "text_encoders.t5xxl.transformer.",
            "t5xxl.transformer.",
            "t5xxl.",
            "t5.",
            "lora_te2_",
            "lora_te3_",
        )
    ),
]
SD3_QKV = tuple(f"transformer_blocks.1.attn2.to_{part}.weight" for part in "qkv")
SD3_NAMES = [
    ("lora_unet_joint_blocks_1_x_block_attn2_qkv", "transformer", SD3_QKV),
    ("diffusion_model.joint_blocks.1.x_block.attn2.qkv", "transformer", SD3_QKV),
    ("transformer.transformer_blocks.1.attn2.to_qkv", "transformer", SD3_QKV),
    ("lora_transformer_transformer_blocks_1_attn2_to_q", "transformer", SD3_QKV[:1]),
    ("lora_te1_text_model_encoder_layers_1_self_attn_q_proj", "text_encoder", (CLIP,)),
    ("text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj", "text_encoder", (CLIP,)),
    ("text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj", "text_encoder_2", (CLIP,)),
    ("clip_g.text_model.encoder.layers.1.self_attn.q_proj", "text_encoder_2", (CLIP,)),
    ("lora_te2_text_model_encoder_layers_1_self_attn_q_proj", "text_encoder_2", (CLIP,)),
    ("lora_te2_text_projection", "text_encoder_2", ("text_projection.weight",)),
    ("text_encoder_2.text_model.encoder.layers.1.self_attn.q_proj", "text_encoder_2", (CLIP,)),
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_q", "text_encoder_3", (T5,)),
    ("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3", (T5,)),
    ("text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", "text_encoder_3", (T5,)),
]


def known(pipeline: object, layout: Layout, folder: Path) -> Index:
    components = {}
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        if isinstance(network := getattr(pipeline, name, None), nn.Module):
            (folder / name).mkdir()
            components[name] = lazily(network, folder / name)
    return index(components, layout)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return known(random_flux.schnell(), FLUX, tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Index:
    return known(random_sd3.medium(), SD3, tmp_path_factory.mktemp("sd3"))


@pytest.mark.parametrize(
    ("model", "written", "component", "weights"),
    [
        *(("flux", *case) for case in FLUX_NAMES),
        *(("sd3", *case) for case in SD3_NAMES),
    ],
)
def test_names(
    model: str, written: str, component: str, weights: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    found = request.getfixturevalue(model).find(written)
    assert found is not None and found.component == component
    assert tuple(target.name.removeprefix("text_model.") for target in found.targets["weight"]) == weights
    assert {target.component for target in found.targets["weight"]} == {component}
    assert written.endswith(found.name)


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("lora_unet_double_blocks_9_img_attn_qkv", "double_blocks.0.img_attn.qkv"),
        ("transformer.transformer_blocks.0.attn.to_qq", "transformer_blocks.0.attn.to_q"),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", "encoder.layers.1.mlp.fc1"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", None),
        ("zzz", None),
    ],
)
def test_names_of_no_module(flux: Index, written: str, near: str | None) -> None:
    assert flux.find(written) is None and flux.lacking(written) is None
    found = flux.nearest(written)
    assert near is None or (found is not None and found.removeprefix("text_model.") == near)


def test_modules_that_a_checkpoint_can_do_without(flux: Index, sd3: Index) -> None:
    for written in ("lora_unet_guidance_in_in_layer", "transformer.time_text_embed.guidance_embedder.linear_1"):
        assert flux.find(written) is None
        assert "guidance embedder" in (flux.lacking(written) or "")
        assert sd3.lacking(written) is None
    assert "without its projection" in (flux.lacking("lora_te1_text_projection") or "")
    del sd3.modules["text_encoder_3"]
    assert (
        sd3.lacking("lora_te3_encoder_block_0_layer_0_SelfAttention_q") == "text_encoder_3 is left out of this export"
    )


def test_names_of_xlabs(tmp_path: Path) -> None:
    """diffusers' converter of the same file, and the products added."""
    dit: FluxTransformer2DModel = random_flux.schnell().transformer
    torch.manual_seed(0)
    tensors = {}
    for name, inputs, outputs in (
        ("double_blocks.0.processor.qkv_lora1", 72, 216),
        ("double_blocks.0.processor.qkv_lora2", 72, 216),
        ("double_blocks.0.processor.proj_lora1", 72, 72),
        ("double_blocks.0.processor.proj_lora2", 72, 72),
        ("single_blocks.1.processor.qkv_lora", 72, 216),
        ("single_blocks.1.processor.proj_lora", 360, 72),
    ):
        tensors |= {f"{name}.down.weight": torch.randn(4, inputs), f"{name}.up.weight": torch.randn(outputs, 4)}
    stored(tensors, tmp_path / "a.safetensors")
    state = merged(dit, [(tmp_path / "a.safetensors", 1.0)], tmp_path)
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    changed = [name for name, weight in dit.state_dict().items() if not torch.equal(weight, state[name])]
    assert len(changed) == len(theirs) / 2 == 12
    for name in changed:
        down, up = (theirs[f"transformer.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(state[name], dit.state_dict()[name] + up @ down, rtol=1e-4, atol=1e-4)
