"""Weights in 8 and 4 bits, in folders and in single files, against the formulas of those who write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import single_files
import torch
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.bfl.utils import dequantize_fp8r, dequantize_nvfp4, quantize_fp8r, quantize_nvfp4
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from ditforge.errors import UserError
from ditforge.export.checkpoint.dequantising import dequantised
from ditforge.export.checkpoint.layouts import open_single_file
from ditforge.export.checkpoint.lazy_tensors import open_tensors
from ditforge.export.checkpoint.load_report import LoadReport
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.families import family_of

SCALE = 0.0137


def read(tensors: dict[str, Tensor], folder: Path, report: LoadReport | None = None, **more: Any) -> dict[str, Tensor]:
    file = folder / "a.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, more.pop("metadata", None))
    found = dequantised(open_tensors(file), report, where=folder, **more)
    for tensor in found.values():  # rows from the middle are those of the whole
        middle = tensor.length // 3, tensor.length - 1
        assert not tensor.shape or torch.equal(tensor.read_rows(*middle), tensor.read()[slice(*middle)])
        assert (tensor.read().dtype, tuple(tensor.read().shape)) == (tensor.dtype, tensor.shape)
    return {name: tensor.read() for name, tensor in found.items()}


def for_cublas(scales: Tensor) -> Tensor:
    """Scales in the tiles that cuBLAS reads, by its documentation: one number after the other."""
    rows, columns = scales.shape
    tiles_across = -(-columns // 4)
    out = torch.zeros(-(-rows // 128) * 128 * tiles_across * 4, dtype=torch.uint8)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * tiles_across + column // 4
            out[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales.view(torch.uint8)[row, column]
    return out.view(scales.dtype).reshape(-(-rows // 128) * 128, tiles_across * 4)


def settings(**values: Any) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("component", ["transformer", "text_encoder_2", "vae"])
def test_float8_folder(component: str, name: str, random_schnell: Path, tmp_path: Path) -> None:
    """The scales stand beside the weights in the folder; without them, the weights were 73 times too large."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(random_schnell, folder)
    (file,) = (folder / component).glob("*.safetensors")
    state = load_file(file)
    written = single_files.in_float8(state, SCALE, name)
    save_file({key: tensor.contiguous() for key, tensor in written.items()}, file)
    weights = open_files(CheckpointSource(folder)).weights(component)
    assert set(weights.shapes) == set(state)
    scaled = 0
    for key, tensor in state.items():
        if written[key].dtype == torch.float8_e4m3fn:
            tensor = (tensor / SCALE).to(torch.float8_e4m3fn).float() * torch.tensor(SCALE)
            scaled += 1
        assert torch.equal(weights.read(key).float(), tensor.float()), key
    assert scaled or component == "vae"


def test_float8_folder_without_scales(random_schnell: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(random_schnell, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in load_file(file).items()}
    save_file(state, file)
    weights = open_files(CheckpointSource(folder)).weights("transformer")
    for key, tensor in state.items():
        assert weights.read(key).dtype == torch.bfloat16
        assert torch.equal(weights.read(key), tensor.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(48,), (48, 1)])
@pytest.mark.parametrize("method", ["fbgemm_fp8", "compressed-tensors", "modelopt", None])
def test_one_scale_a_row(method: str | None, shape: tuple[int, ...], tmp_path: Path) -> None:
    weight, scale = quantize_fp8r(torch.randn(48, 32))
    config = {"quant_method": method} if method else None
    found = read({"a.weight": weight, "a.weight_scale": scale.reshape(shape)}, tmp_path, config=config)
    assert torch.equal(found["a.weight"], dequantize_fp8r(weight, scale))


def test_other_tensors_than_weights(tmp_path: Path) -> None:
    bias, table = torch.randn(8).to(torch.float8_e5m2), torch.randn(4, 8).to(torch.float8_e4m3fn)
    tensors = {"a.bias": bias, "a.bias_scale": torch.tensor(0.5), "table": table, "scale_table": torch.tensor(3.0)}
    found = read(tensors | {"clip.logit_scale": torch.tensor(4.6)}, tmp_path)
    assert torch.equal(found["a.bias"], bias.float() * 0.5)
    assert torch.equal(found["table"], table.float() * 3)
    assert found["clip.logit_scale"] == torch.tensor(4.6)
    assert len(found) == 3


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (200, 130), (64, 64)])
def test_blocks_as_deepseek_has_them(rows: int, columns: int, tmp_path: Path) -> None:
    """transformers' own dequantisation; it takes whole blocks only, so that the weight is padded for it."""
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = torch.randn(rows, columns)
    weight = padded.to(torch.float8_e4m3fn)
    scale = torch.rand(weight.shape[0] // 128, weight.shape[1] // 128) + 0.5
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    for config in (None, {"quant_method": "fp8", "weight_block_size": [128, 128]}):
        tensors = {"a.weight": weight[:rows, :columns], "a.weight_scale_inv": scale}
        found = read(tensors, tmp_path, config=config)["a.weight"]
        assert torch.equal(found, theirs[:rows, :columns])


@pytest.mark.parametrize("kind", ["E8M0", "bytes"])
def test_mxfp8_in_rows(kind: str, tmp_path: Path) -> None:
    """ModelOpt's and compressed-tensors' layout; PyTorch's own numbers of E8M0."""
    weight = torch.randn(160, 96).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 140, (160, 3), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    stored = exponents if kind == "E8M0" else exponents.view(torch.uint8)
    found = read({"a.weight": weight, "a.weight_scale": stored}, tmp_path)
    assert torch.equal(found["a.weight"], weight.float() * exponents.float().repeat_interleave(32, 1))


@pytest.mark.parametrize("where", ["tensor", "metadata"])
def test_mxfp8_of_comfyui(where: str, tmp_path: Path) -> None:
    weight = torch.randn(160, 320).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 140, (160, 10), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors, more = {"a.weight": weight, "a.weight_scale": for_cublas(exponents)}, {}
    if where == "tensor":
        tensors["a.comfy_quant"] = settings(format="mxfp8")
    else:
        more = {"metadata": {"_quantization_metadata": json.dumps({"layers": {"a": {"format": "mxfp8"}}})}}
    found = read(tensors, tmp_path, **more)
    assert torch.equal(found["a.weight"], weight.float() * exponents.float().repeat_interleave(32, 1))


@pytest.mark.parametrize("kind", ["modelopt", "compressed-tensors", "comfyui"])
def test_nvfp4(kind: str, tmp_path: Path) -> None:
    """diffusers' dequantisation of ModelOpt's layout; the other layouts hold the same numbers."""
    weight, scale, second = quantize_nvfp4(torch.randn(160, 96))
    expected = dequantize_nvfp4(weight, scale, second)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.weight_scale_2": second}
    if kind == "compressed-tensors":
        tensors = {"a.weight_packed": weight, "a.weight_scale": scale, "a.weight_global_scale": 1 / second}
    if kind == "comfyui":
        swapped = weight >> 4 | weight << 4
        tensors |= {"a.weight": swapped, "a.weight_scale": for_cublas(scale), "a.comfy_quant": settings(format="nvfp4")}
    tensors["a.input_scale"] = torch.tensor(2.0)
    report = LoadReport()
    found = read(tensors, tmp_path, report)
    assert torch.allclose(found["a.weight"], expected, rtol=1e-6)
    assert list(found) == ["a.weight"]
    assert not report.unexpected
    assert any("a.input_scale" in note.what for note in report.notes)


def test_nvfp4_file_of_flux(tmp_path: Path) -> None:
    """A fused linear is cut where its weight is."""
    torch.manual_seed(0)
    dit = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    tensors, key = single_files.flux_dit(dit.state_dict()), "double_blocks.0.img_attn.qkv.weight"
    weight, scale, second = quantize_nvfp4(tensors[key])
    tensors |= {key: weight, key + "_scale": scale, key + "_scale_2": second}
    file = tmp_path / "a.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    found = open_single_file(file).components["transformer"]
    for name, part in zip("qkv", dequantize_nvfp4(weight, scale, second).chunk(3), strict=True):
        assert torch.allclose(found[f"transformer_blocks.0.attn.to_{name}.weight"].read(), part)


def test_what_scales_nothing_is_said(tmp_path: Path) -> None:
    report = LoadReport()
    tensors = {"a.weight": torch.ones(2, 2), "a.weight_scale": torch.tensor(2.0), "b.weight_scale": torch.tensor(2.0)}
    found = read(tensors, tmp_path, report)
    assert torch.equal(found["a.weight"], torch.full((2, 2), 2.0))
    assert list(found) == ["a.weight"]
    said = " ".join(map(str, report.unexpected))
    assert "b.weight_scale: scales of b.weight, which is not there" in said
    assert "a.weight is not float8" in said


FP8 = torch.zeros(32, 32).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"a.weight_scale": torch.ones(7)}, r"shape \[7\], the weight \[32, 32\]"),
        ({"a.weight_scale": torch.ones(5, 7)}, r"shape \[5, 7\]"),
        ({"a.weight_scale": torch.tensor(1.0), "a.scale_weight": torch.tensor(1.0)}, "two scales"),
        ({"a.weight_scale_2": torch.tensor(1.0)}, "no first scale"),
        ({"a.weight_scale": torch.tensor(1.0), "a.pre_quant_scale": torch.ones(32)}, "divided by factors"),
        ({"a.weight_scale": torch.tensor(1.0), "a.comfy_quant": settings(format="convrot_w4a4")}, "convrot_w4a4"),
        ({"a.weight": FP8.view(torch.int8), "a.weight_scale": torch.tensor(1.0)}, "int8, weights packed"),
        ({"a.weight": FP8.view(torch.uint8), "a.weight_scale": torch.ones(32, 9).to(FP8.dtype)}, r"\[32, 9\]"),
    ],
)
def test_scales_that_fit_nothing(tensors: dict[str, Tensor], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as error:
        read({"a.weight": FP8, **tensors}, tmp_path)
    assert error.value.fix


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "torchao", "quant_type": "int8wo"}, "torchao"),
        ({"quant_method": "gptq"}, "GPTQ"),
        ({"quant_method": "quanto"}, "Quanto"),
        ({"quant_method": "sdnq"}, "SDNQ"),
        ({"quant_method": "new"}, "new"),
    ],
)
def test_methods_that_a_configuration_names(
    config: dict[str, Any], name: str, random_schnell: Path, tmp_path: Path
) -> None:
    """For a text encoder as for the DiT; weights that are plain are read, and it is said."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(random_schnell, folder)
    path = folder / "text_encoder_2"
    own = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(own | {"quantization_config": config}))
    checkpoint = open_files(CheckpointSource(folder))
    checkpoint.weights("text_encoder_2")
    assert any("quantization_config" in note.what and name in note.why for note in checkpoint.report.unexpected)
    state = load_file(path / "model.safetensors")
    state["encoder.block.0.layer.0.SelfAttention.q.weight"] = torch.zeros(60, 56, dtype=torch.int8)
    save_file(state, path / "model.safetensors")
    with pytest.raises(UserError, match=f"text_encoder_2 has weights packed by {name}") as error:
        open_files(CheckpointSource(folder)).weights("text_encoder_2")
    assert "black-forest-labs" in error.value.fix


def test_calibration_runs_on_the_dequantised_weights(random_schnell: Path, tmp_path: Path) -> None:
    """diffusers alone would read the float8 numbers without their scales."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(random_schnell, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    written = single_files.in_float8(load_file(file), SCALE, "weight_scale")
    save_file({key: tensor.contiguous() for key, tensor in written.items()}, file)
    checkpoint = open_files(CheckpointSource(folder))
    assert [checkpoint.read_otherwise(name) for name in ("transformer", "vae", "text_encoder")] == [True, False, False]
    pipeline = family_of(checkpoint).load_pipeline(checkpoint)
    state = pipeline.transformer.state_dict()
    key = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(state[key].cpu().float(), checkpoint.weights("transformer").read(key))
