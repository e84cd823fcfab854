"""Where the strength of an adapter is written, against diffusers and PEFT, and what contradicts itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import random_flux
import torch
from diffusers import FluxTransformer2DModel
from merged import merged, saved_by_peft, stored
from peft import LoraConfig

from ditforge.errors import UserError
from ditforge.export.checkpoint.load_report import LoadReport

NAME = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def dit() -> FluxTransformer2DModel:
    return random_flux.schnell().transformer


def lora(rank: int = 4, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    down, up = torch.randn(rank, 72), torch.randn(72, rank)
    return {f"transformer.{NAME}.lora_A.weight": down, f"transformer.{NAME}.lora_B.weight": up} | others


def scale(dit: FluxTransformer2DModel, folder: Path, report: LoadReport | None = None) -> float:
    """The factor with which the LoRA in the folder is added."""
    tensors = lora()
    before = dit.state_dict()[f"{NAME}.weight"]
    added = merged(dit, [(folder / "adapter_model.safetensors", 1.0)], folder, report)[f"{NAME}.weight"] - before
    product = tensors[f"transformer.{NAME}.lora_B.weight"] @ tensors[f"transformer.{NAME}.lora_A.weight"]
    factor = float((added * product).sum() / (product * product).sum())
    torch.testing.assert_close(added, factor * product, rtol=1e-3, atol=1e-3)
    return round(factor, 4)


@pytest.mark.parametrize("diffusers", [True, False])
def test_metadata_without_a_prefix(diffusers: bool, tmp_path: Path) -> None:
    """What diffusers' save_lora_adapter() writes, and PEFT's folder of the same adapter."""
    targets = ["to_q", "net.2"]
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, alpha_pattern={"net.2": 2}, use_rslora=True
    )
    expected = saved_by_peft(random_flux.schnell().transformer, config, tmp_path / "peft")
    file = tmp_path / "peft" / "adapter_model.safetensors"
    if diffusers:
        model = random_flux.schnell().transformer
        model.add_adapter(config)
        torch.manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.add_(torch.randn_like(parameter))
        model.save_lora_adapter(tmp_path / "diffusers")
        file = tmp_path / "diffusers" / "pytorch_lora_weights.safetensors"
        model.fuse_lora()
        model.unload_lora()
        expected = model.state_dict()
    ours = merged(random_flux.schnell().transformer, [(file, 1.0)], tmp_path)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "alpha", "factor"),
    [
        ({"r": 4, "lora_alpha": 16}, None, 4.0),
        ({"r": 4, "lora_alpha": 16}, 16.0, 4.0),
        ({"r": 8, "rank_pattern": {"attn.to_q": 4, "to_q": 2}, "lora_alpha": 16}, None, 4.0),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {".*": 2, "to_q": 3}}, None, 0.5),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"q": 2, "^attn.to_q": 3}}, None, 4.0),
        ({"r": 4, "lora_alpha": 16, "use_rslora": True}, None, 8.0),
        ({}, None, 1.0),
    ],
)
def test_adapter_config(
    dit: FluxTransformer2DModel, config: dict[str, object], alpha: float | None, factor: float, tmp_path: Path
) -> None:
    """A pattern is a module's name from a dot on, or from its start with ^."""
    others = {} if alpha is None else {f"transformer.{NAME}.alpha": torch.tensor(alpha, dtype=torch.bfloat16)}
    stored(lora(**others), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    assert scale(dit, tmp_path) == factor


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 8, "lora_alpha": 16}, "has rank 4, and .*adapter_config.json says 8"),
        ({"r": 4, "lora_alpha": 8}, "scaled by 0.25 with its tensor alpha, and by 2 with .*adapter_config.json"),
        ({"r": 4, "lora_alpha": float("nan")}, "lora_alpha is nan, and no finite number"),
        ({"r": 0, "lora_alpha": 8}, "the rank of .* is 0"),
        ({"r": 4, "lora_alpha": "8"}, "lora_alpha is '8', and no finite number"),
        ({"r": 4, "alpha_pattern": {"(": 8}}, "alpha_pattern is damaged"),
        ({"r": 4, "alpha_pattern": [8]}, "alpha_pattern is damaged"),
        ({"r": 4, "lora_alpha": 1, "use_dora": True}, "has use_dora, and .* has no magnitudes"),
        ({"peft_type": "VERA"}, "an adapter of PEFT's kind VERA"),
    ],
)
def test_what_contradicts_itself(
    dit: FluxTransformer2DModel, config: dict[str, object], message: str, tmp_path: Path
) -> None:
    stored(lora(**{f"transformer.{NAME}.alpha": torch.tensor(1.0)}), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        scale(dit, tmp_path)


def test_two_configurations(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    """The same in the header and beside the file is fine."""
    metadata = {"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 16})}
    stored(lora(), tmp_path / "adapter_model.safetensors", metadata)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16, "rank_pattern": {}}))
    assert scale(dit, tmp_path) == 4.0
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    with pytest.raises(UserError, match="other settings in lora_adapter_metadata"):
        scale(dit, tmp_path)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"lora_alpha": "16", "r": "4"}, "lora_alpha 16 of rank 4"),
        ({"lora_config": json.dumps({"r": 4, "lora_alpha": 16})}, "lora_alpha of lora_config 16 of rank 4"),
        ({"transformer.lora_alpha": "auto"}, "transformer.lora_alpha of rank 4"),
        ({"lora_config": json.dumps({"r": 4, "lora_alpha": 4}), "ss_network_args": '{"conv_alpha": "1"}'}, ""),
        ({"note": "[" * 2000, "lora_alpha": "4.0"}, ""),
    ],
)
def test_metadata_that_nobody_reads(
    metadata: dict[str, str], said: str, dit: FluxTransformer2DModel, tmp_path: Path
) -> None:
    """An alpha in other places has no effect in diffusers, ComfyUI and sd-scripts: it is said where it would have."""
    stored(lora(), tmp_path / "adapter_model.safetensors", metadata)
    report = LoadReport()
    assert scale(dit, tmp_path, report) == 1.0
    assert len(report.unexpected) == bool(said) and said in "".join(map(str, report.unexpected))


def test_kohyas_metadata_has_no_effect_and_that_is_said(dit: FluxTransformer2DModel, tmp_path: Path) -> None:
    """sd-scripts takes the rank for a missing alpha (networks/lora.py, create_network_from_weights)."""
    for alpha, said in (("2", 1), ("4", 0)):
        stored(lora(), tmp_path / "adapter_model.safetensors", {"ss_network_alpha": alpha, "ss_network_dim": "4"})
        report = LoadReport()
        assert scale(dit, tmp_path, report) == 1.0
        assert len(report.unexpected) == said
        assert not said or "read alpha only from tensors" in str(report.unexpected[0])
