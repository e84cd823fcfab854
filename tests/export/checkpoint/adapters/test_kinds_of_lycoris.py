"""Adapters as LyCORIS writes them, against what LyCORIS makes of the same layers; fused layers of the authors, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import random_flux
import random_sd3
import single_files
import torch
from diffusers import FluxTransformer2DModel
from lycoris.functional.general import apply_dora_scale
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from merged import authors_layer, lazily, merged, random_numbers, stored
from torch import Tensor, nn

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.fusing import fuse
from ditforge.export.families.flux_layout import LAYOUT as FLUX
from ditforge.export.families.sd3_layout import LAYOUT as SD3

Make = Callable[[nn.Module], nn.Module]
LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "final_layer.adaLN_modulation.1", "img_in")
KINDS: dict[str, Make] = {
    "lora": lambda layer: LoConModule("x", layer, lora_dim=4, alpha=3),
    "rs-lora": lambda layer: LoConModule("x", layer, lora_dim=4, alpha=3, rs_lora=True),
    "dora": lambda layer: LoConModule("x", layer, lora_dim=4, alpha=3, weight_decompose=True),
    "dora-columns": lambda layer: LoConModule("x", layer, lora_dim=4, alpha=3, weight_decompose=True, wd_on_out=False),
    "loha": lambda layer: LohaModule("x", layer, lora_dim=4, alpha=3),
    "loha-dora": lambda layer: LohaModule("x", layer, lora_dim=4, alpha=3, weight_decompose=True),
    "lokr": lambda layer: LokrModule("x", layer, lora_dim=2, alpha=3, factor=4),
    "lokr-both": lambda layer: LokrModule("x", layer, lora_dim=1, alpha=3, factor=8, decompose_both=True),
    "lokr-whole": lambda layer: LokrModule("x", layer, lora_dim=99999, alpha=3, factor=4, full_matrix=True),
    "lokr-dora": lambda layer: LokrModule("x", layer, lora_dim=2, alpha=3, factor=4, weight_decompose=True),
    "oft": lambda layer: DiagOFTModule("x", layer, lora_dim=8),
    "oft-constraint": lambda layer: DiagOFTModule("x", layer, lora_dim=8, constraint=0.01, rescaled=True),
    "boft": lambda layer: ButterflyOFTModule("x", layer, lora_dim=18),
    "full": lambda layer: FullModule("x", layer),
}


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


def written(module: nn.Module, name: str) -> dict[str, Tensor]:
    """The adapter of a layer as LyCORIS saves it."""
    if isinstance(module, FullModule):
        return {f"{name}.diff": module.weight, f"{name}.diff_b": module.bias}
    state = getattr(module, "custom_state_dict", module.state_dict)() or module.state_dict()
    return {f"{name}.{key}": tensor for key, tensor in state.items()}


@torch.no_grad()
def effective(module: nn.Module, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias that a linear has with its adapter, from its outputs for unit vectors and zeros.

    LyCORIS 4.1.3 multiplies by alpha / rank twice where it merges LoHa and LoKr, and once where it trains them.
    """
    inputs = torch.cat((torch.zeros(1, layer.in_features), torch.eye(layer.in_features)))
    bias, *columns = module.eval()(inputs)
    return torch.stack(columns, dim=1) - bias[:, None], bias


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(dit: FluxTransformer2DModel, kind: str, tmp_path: Path) -> None:
    strength = 1.0 if "dora" in kind else 0.7
    tensors, expected, biases = {}, {}, {}
    layers = ("img_in",) if kind == "boft" else LAYERS  # the others have sizes that BOFT cannot divide
    for number, name in enumerate(layers):
        layer = authors_layer(dit, name)
        adapter = KINDS[kind](layer)
        random_numbers(adapter, std=0.1 if "oft" in kind else 0.3)
        tensors |= written(adapter, f"lycoris_{name.replace('.', '_')}" if number % 2 else f"diffusion_model.{name}")
        adapter.multiplier = strength
        expected[name], biases[name] = effective(adapter, layer)
    stored(tensors, tmp_path / "a.safetensors")
    state = single_files.flux_dit(merged(dit, [(tmp_path / "a.safetensors", strength)], tmp_path))
    before = single_files.flux_dit(dit.state_dict())
    for name, weight in expected.items():
        assert not torch.allclose(weight, before[f"{name}.weight"], atol=1e-3)
        torch.testing.assert_close(state[f"{name}.weight"], weight, rtol=1e-4, atol=1e-4)
        if kind == "full":
            torch.testing.assert_close(state[f"{name}.bias"], biases[name])
    unchanged = [name for name in before if torch.equal(state[name], before[name])]
    assert len(unchanged) == len(before) - len(layers) * (2 if kind == "full" else 1)


def test_the_strength_of_a_dora_mixes_the_weights(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    """With a strength of 0, nothing changes."""
    name = "double_blocks.0.img_attn.qkv"
    layer = authors_layer(dit, name)
    adapter = LoConModule("x", layer, lora_dim=4, alpha=3, weight_decompose=True, wd_on_out=False)
    random_numbers(adapter)
    stored(written(adapter, name), tmp_path / "a.safetensors")
    with torch.no_grad():
        delta = adapter.get_diff_weight(1, layer.weight.shape)[0]
    for strength in (0.0, 0.4):
        state = single_files.flux_dit(merged(dit, [(tmp_path / "a.safetensors", strength)], tmp_path))
        theirs = apply_dora_scale(layer.weight.detach(), delta, adapter.dora_scale.detach(), strength)
        torch.testing.assert_close(state[f"{name}.weight"], theirs, rtol=1e-4, atol=1e-4)


def test_convolutions(tmp_path: Path) -> None:
    """SD3's only convolution, with the Tucker decompositions that LyCORIS has for kernels."""
    dit = random_sd3.medium().transformer
    layer = dit.pos_embed.proj
    for number, (kind, options) in enumerate(
        (
            (LoConModule, {"use_tucker": True}),
            (LoConModule, {"use_tucker": True, "weight_decompose": True}),
            (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
            (LohaModule, {"use_tucker": True}),
            (LohaModule, {}),
            (LokrModule, {"use_tucker": True, "factor": 4}),
            (LokrModule, {"factor": 4}),
            (DiagOFTModule, {}),
        )
    ):
        adapter = kind("x", layer, lora_dim=2, alpha=3, **options)
        random_numbers(adapter, 0.3)
        file = tmp_path / f"{number}.safetensors"
        stored(written(adapter, "lora_unet_x_embedder_proj"), file)
        fused = fuse({"transformer": lazily(dit, tmp_path)}, [(file, 1.0)], SD3)["transformer"]
        with torch.no_grad():
            delta = adapter.get_weight(layer.weight.shape) if hasattr(adapter, "get_weight") else None
            theirs = adapter.get_merged_weight(1.0, layer.weight.shape)[0] if delta is None else layer.weight + delta
        torch.testing.assert_close(fused["pos_embed.proj.weight"].read(), theirs, rtol=1e-4, atol=1e-4)


def test_norms(tmp_path: Path) -> None:
    """FLUX's only norms with weights are those of queries and keys; CLIP's have biases, too."""
    pipeline = random_flux.schnell()
    encoder = pipeline.text_encoder
    layer = dict(encoder.named_modules())
    name = next(name for name in layer if name.endswith("encoder.layers.0.layer_norm1"))
    adapter = NormModule("x", layer[name])
    random_numbers(adapter)
    stored(written(adapter, "lora_te1_text_model_encoder_layers_0_layer_norm1"), tmp_path / "a.safetensors")
    fused = fuse({"text_encoder": lazily(encoder, tmp_path)}, [(tmp_path / "a.safetensors", 0.7)], FLUX)
    with torch.no_grad():
        weight, bias = adapter.get_merged_weight(0.7)
    torch.testing.assert_close(fused["text_encoder"][f"{name}.weight"].read(), weight)
    torch.testing.assert_close(fused["text_encoder"][f"{name}.bias"].read(), bias)
    query = pipeline.transformer.transformer_blocks[0].attn.norm_q.weight.detach()
    for key in (
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.scale.diff",
        "lora_unet_double_blocks_0_img_attn_norm_query_norm.w_norm",
    ):
        stored({key: torch.ones(24)}, tmp_path / "b.safetensors")
        state = merged(pipeline.transformer, [(tmp_path / "b.safetensors", 0.5)], tmp_path)
        torch.testing.assert_close(state["transformer_blocks.0.attn.norm_q.weight"], query + 0.5)


def test_numbers_that_are_not_finite(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    for kind, part in (
        ("lora", "lora_up.weight"),
        ("loha", "hada_w2_b"),
        ("lokr", "lokr_w1"),
        ("oft", "oft_blocks"),
        ("dora", "dora_scale"),
    ):
        adapter = KINDS[kind](authors_layer(dit, "img_in"))
        tensors = written(adapter, "lora_unet_img_in")
        tensors[f"lora_unet_img_in.{part}"] = torch.full_like(tensors[f"lora_unet_img_in.{part}"], float("inf"))
        stored(tensors, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match="NaN or infinity"):
            merged(dit, [(tmp_path / "a.safetensors", 1.0)], tmp_path)
