"""Calibrating what is put together of files: diffusers runs the same weights as from a folder that holds them all."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import random_flux
import random_sd3
import single_files
import torch
from calibrations import CHANGE, assert_same, assert_same_ranges, largest_change
from command_line import ditforge
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file, save_file

from ditforge.errors import DitforgeWarning, UserError
from ditforge.export import onnx_export
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.quantisation import calibration
from ditforge.export.quantisation.calibration import Calibration, calibrate
from ditforge.export.quantisation.precision import parse_precision

PROMPT = ["a red circle"]
ATTENTION, CLIP = "lora_unet_double_blocks_0_img_attn_qkv", "lora_te1_text_model_encoder_layers_1_mlp_fc1"
FP8 = parse_precision("fp8", "fp32")
# The same weights from another file lie elsewhere in memory. On some CPUs, how libraries add up depends on a tensor's
# address too, so that sums of some hundred products differ in their last bits; other weights differ by percents.
ROUNDING = 1e-5


def save(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file)
    return file


def save_all_in_one(pipeline: DiffusionPipeline, file: Path) -> Path:
    """ComfyUI's layout, with T5's embeddings under one of their two names."""
    tensors = single_files.prefixed("model.diffusion_model.", single_files.flux_dit(pipeline.transformer.state_dict()))
    clip = single_files.text_model(pipeline.text_encoder.state_dict())
    tensors |= single_files.prefixed("text_encoders.clip_l.transformer.", clip)
    tensors |= single_files.prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_2.state_dict())
    tensors |= single_files.prefixed("vae.", single_files.autoencoder(pipeline.vae.state_dict()))
    del tensors["text_encoders.t5xxl.transformer.shared.weight"]
    return save(tensors, file)


@pytest.fixture(scope="module")
def bare(random_schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint as a base that has nothing but tokenizers and configurations, not even the scheduler's."""
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(random_schnell, folder, ignore=shutil.ignore_patterns("*.safetensors", "scheduler"))
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the DiT and for CLIP that changes what they compute."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, inputs, outputs in ((ATTENTION, 72, 216), (CLIP, 48, 80)):
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 2, generator=generator)
    return save(tensors, tmp_path_factory.mktemp("lora") / "style.safetensors")


@pytest.fixture(scope="module")
def merged(random_schnell: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the LoRA, at half its strength, was merged by hand."""
    pipeline, tensors = FluxPipeline.from_pretrained(random_schnell), load_file(lora)

    def product(name: str) -> torch.Tensor:
        return 0.5 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]

    with torch.no_grad():
        attention = pipeline.transformer.transformer_blocks[0].attn
        for part, rows in zip("qkv", product(ATTENTION).chunk(3), strict=True):
            getattr(attention, f"to_{part}").weight += rows
        layer = next(m for n, m in pipeline.text_encoder.named_modules() if n.endswith("encoder.layers.1.mlp.fc1"))
        layer.weight += product(CLIP)
    folder = tmp_path_factory.mktemp("merged") / "merged"
    pipeline.save_pretrained(folder)
    random_flux.save_settings(folder)
    return folder


def ranges_of(source: CheckpointSource, out: Path) -> Calibration:
    return calibrate(source, out / "ranges.json", PROMPT, 2)


def test_a_single_file_gives_the_calibration_of_its_folder(random_schnell: Path, bare: Path, tmp_path: Path) -> None:
    """By the command line; both are called alike, so the whole file is. The scheduler is the published one's."""
    file = save_all_in_one(FluxPipeline.from_pretrained(random_schnell), tmp_path / "random-schnell.safetensors")
    (tmp_path / "prompts.txt").write_text(PROMPT[0])
    options = ("--prompts", "prompts.txt", "--steps", "2")
    result = ditforge("calibrate", file, "--base", bare, *options, "--out", "file.json", cwd=tmp_path)
    assert result.code == 0, result.err
    expected = ranges_of(CheckpointSource(random_schnell), tmp_path)
    assert_same(Calibration.model_validate_json((tmp_path / "file.json").read_bytes()), expected)
    assert len(set(expected.amax.values())) > 10


def test_only_the_dit_is_the_files(random_schnell: Path, merged: Path, tmp_path: Path) -> None:
    """A fine-tune in BFL's layout: text encoders, VAE and the rest of the configuration are the base's."""
    dit = FluxPipeline.from_pretrained(merged).transformer
    file = save(single_files.flux_dit(dit.state_dict()), tmp_path / "tuned.safetensors")
    found = ranges_of(CheckpointSource(file, random_schnell), tmp_path)
    both = FluxPipeline.from_pretrained(random_schnell, transformer=dit)
    both.save_pretrained(tmp_path / "folder")
    random_flux.save_settings(tmp_path / "folder")
    expected = ranges_of(CheckpointSource(tmp_path / "folder"), tmp_path)
    assert_same_ranges(found, expected)
    assert found.config_sha256 == expected.config_sha256
    assert largest_change(found, ranges_of(CheckpointSource(random_schnell), tmp_path)) > CHANGE


def test_a_lora_gives_the_calibration_of_a_folder_that_it_was_merged_into(
    random_schnell: Path, bare: Path, merged: Path, lora: Path, tmp_path: Path
) -> None:
    expected = ranges_of(CheckpointSource(merged), tmp_path)
    file = save_all_in_one(FluxPipeline.from_pretrained(random_schnell), tmp_path / "all.safetensors")
    for source, base in ((random_schnell, None), (file, bare)):
        found = ranges_of(CheckpointSource(source, base, ((lora, 0.5),)), tmp_path)
        assert_same_ranges(found, expected)
        assert largest_change(found, ranges_of(CheckpointSource(random_schnell), tmp_path)) > CHANGE
        assert found.loras == ("style.safetensors:0.5",)


@pytest.mark.parametrize("with_t5", [True, False])
def test_stable_diffusion(with_t5: bool, tmp_path: Path) -> None:
    """Its position table is a buffer, and a base may be without T5."""
    folder = (random_sd3.save_medium if with_t5 else random_sd3.save_large_turbo)(tmp_path)
    pipeline = (random_sd3.medium if with_t5 else random_sd3.large)()
    tensors = single_files.prefixed("model.diffusion_model.", single_files.sd3_dit(pipeline.transformer.state_dict()))
    clip = single_files.text_model(pipeline.text_encoder_2.state_dict())
    tensors |= single_files.prefixed("text_encoders.clip_g.transformer.", clip)
    found = ranges_of(CheckpointSource(save(tensors, tmp_path / f"{folder.name}.safetensors"), folder), tmp_path)
    assert_same_ranges(found, ranges_of(CheckpointSource(folder), tmp_path))


def test_the_worst_linears_of_a_file_with_a_lora_are_those_of_the_merged_folder(
    random_schnell: Path, bare: Path, merged: Path, lora: Path, tmp_path: Path
) -> None:
    file = save_all_in_one(FluxPipeline.from_pretrained(random_schnell), tmp_path / "all.safetensors")
    precision = parse_precision("int8-weights", "fp32")
    found = onnx_export.measure_linears(
        open_files(CheckpointSource(file, bare, ((lora, 0.5),))), precision, None, 0.003, None
    )
    expected = onnx_export.measure_linears(open_files(CheckpointSource(merged)), precision, None, 0.003, None)
    assert found is not None and expected is not None
    # Rounding changes an error by 1e-6 of it, and 0.2 % at least lie between two of those that are kept.
    assert found.keep == expected.keep != ()
    assert found.errors == pytest.approx(expected.errors, rel=1e-4)
    assert found.velocity == pytest.approx(expected.velocity, rel=1e-4)


def test_ranges_of_other_weights_are_taken_with_a_warning(
    random_schnell: Path, ranges: Path, lora: Path, tmp_path: Path
) -> None:
    """Fine-tunes and LoRAs keep the configuration, and ranges with it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DitforgeWarning)
        assert calibration.read_ranges(ranges, open_files(CheckpointSource(random_schnell)), FP8)
    said = r"for random-schnell, and this is random-schnell with style\.safetensors:0\.5"
    with pytest.warns(DitforgeWarning, match=said):
        assert calibration.read_ranges(ranges, open_files(CheckpointSource(random_schnell, loras=((lora, 0.5),))), FP8)


def test_a_checkpoint_that_cannot_be_run_is_refused_in_plain_words(random_schnell: Path, tmp_path: Path) -> None:
    """Before anything is loaded, which takes minutes for a large model."""
    base = tmp_path / "base"
    shutil.copytree(random_schnell, base)
    file = save_all_in_one(FluxPipeline.from_pretrained(random_schnell), tmp_path / "all.safetensors")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"transformer": ["os", "system"]}))
    with pytest.raises(UserError, match="transformer is a system of os"):
        ranges_of(CheckpointSource(file, base), tmp_path)
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="vae has no weights"):
        ranges_of(CheckpointSource(base), tmp_path)
    assert not (tmp_path / "ranges.json").exists()
