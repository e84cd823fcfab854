"""A single file with a base folder, and LoRAs, become the graphs that a folder of the same weights becomes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import random_flux
import random_sd3
import single_files
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors.torch import load_file, save_file

from ditforge.errors import UserError
from ditforge.export.checkpoint import consistency
from ditforge.export.checkpoint.source import CheckpointSource, fingerprint, open_files
from ditforge.export.families import family_of
from ditforge.export.onnx_export import ExportOptions, export_checkpoint, export_network
from ditforge.export.quantisation.precision import FP32, parse_precision


def save(tensors: dict[str, torch.Tensor], file: Path) -> Path:
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, file)
    return file


def save_dit(pipeline: DiffusionPipeline, file: Path) -> Path:
    """Only the DiT, as fine-tunes in BFL's layout are published."""
    return save(single_files.flux_dit(pipeline.transformer.state_dict()), file)


def save_lora(file: Path, fill: float = 1.0) -> Path:
    """A LoRA whose product is the sum of two numbers: the same bits in whatever order a CPU takes them."""
    down, up = torch.full((2, 72), fill), torch.randn(216, 2, generator=torch.Generator().manual_seed(0))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    return save({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, file)


def test_only_the_dit_comes_from_the_file(random_schnell: Path, tmp_path: Path) -> None:
    """The rest comes from the base, whose own DiT is another one."""
    tuned = random_flux.schnell(seed=5)
    checkpoint = open_files(CheckpointSource(save_dit(tuned, tmp_path / "tuned.safetensors"), random_schnell))
    assert checkpoint.name == "tuned"
    weights, folder = checkpoint.weights("transformer"), tuned.transformer.state_dict()
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in folder.items())
    assert checkpoint.weights("vae").shards == open_files(CheckpointSource(random_schnell)).weights("vae").shards
    family = family_of(checkpoint)
    for network in family.networks(checkpoint, FP32):
        consistency.check_weights(network, checkpoint.weights(network.weights))
    assert family.model(checkpoint).name == "tuned"


def test_export_of_all_in_one_is_that_of_the_folder(random_schnell: Path, tmp_path: Path) -> None:
    """All weights from one file in ComfyUI's layout, tokenizers from the base; a LoRA is as if it had been fused."""
    pipeline = FluxPipeline.from_pretrained(random_schnell)
    tensors = single_files.prefixed("model.diffusion_model.", single_files.flux_dit(pipeline.transformer.state_dict()))
    clip = single_files.text_model(pipeline.text_encoder.state_dict())
    tensors |= single_files.prefixed("text_encoders.clip_l.transformer.", clip)
    tensors |= single_files.prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_2.state_dict())
    tensors |= single_files.prefixed("vae.", single_files.autoencoder(pipeline.vae.state_dict()))
    tensors.pop("text_encoders.t5xxl.transformer.encoder.embed_tokens.weight", None)
    file = save(tensors, tmp_path / "random-schnell.safetensors")
    base = tmp_path / "base"
    shutil.copytree(random_schnell, base, ignore=shutil.ignore_patterns("*.safetensors"))
    lora = save_lora(tmp_path / "lora.safetensors")
    options = ExportOptions("fp32")  # which other tests have traced
    source = CheckpointSource(file, base, ((lora, 0.5),))
    found = export_checkpoint(source, tmp_path / "single", options)
    assert export_checkpoint(source, tmp_path / "single", options).fresh

    up = load_file(lora)["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    with torch.no_grad():
        for linear, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
            weight = getattr(pipeline.transformer.transformer_blocks[0].attn, linear).weight
            weight += 0.5 * (rows @ torch.ones(2, 72))
    pipeline.save_pretrained(tmp_path / "fused" / "random-schnell")
    random_flux.save_settings(tmp_path / "fused" / "random-schnell")
    expected = export_checkpoint(CheckpointSource(tmp_path / "fused" / "random-schnell"), tmp_path / "folder", options)
    assert found.manifest.components == expected.manifest.components
    assert found.manifest.model == expected.manifest.model


def test_however_its_weights_are_stored_a_dit_gives_the_same_files(flux_tiny: Path, tmp_path: Path) -> None:
    """The trained model's folder, the same in shards, and a file in BFL's layout; 8-bit linears, the rest in fp32."""
    dit = FluxPipeline.from_pretrained(flux_tiny, text_encoder_2=None, tokenizer_2=None, vae=None).transformer
    sharded = tmp_path / "sharded"
    shutil.copytree(flux_tiny, sharded, ignore=shutil.ignore_patterns("diffusion_pytorch_model.safetensors"))
    dit.save_pretrained(sharded / "transformer", max_shard_size="2MB")
    assert len(list((sharded / "transformer").glob("*.safetensors"))) > 2
    file = save(single_files.flux_dit(dit.state_dict()), tmp_path / "dit.safetensors")
    precision, found = parse_precision("int8-weights", "fp32"), []
    sources = CheckpointSource(flux_tiny), CheckpointSource(sharded), CheckpointSource(file, flux_tiny)
    for number, source in enumerate(map(open_files, sources)):
        network = next(n for n in family_of(source).networks(source, precision) if n.name == "dit")
        (tmp_path / str(number)).mkdir()
        component = export_network(network, source, tmp_path / str(number), precision.scheme)
        found.append([component, *(path.read_bytes() for path in sorted((tmp_path / str(number)).iterdir()))])
    assert len(found[0]) == 4
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_sd3_with_its_own_sizes(tmp_path: Path) -> None:
    folder = random_sd3.save_medium(tmp_path)
    pipeline = random_sd3.medium(seed=7)
    tensors = single_files.prefixed("model.diffusion_model.", single_files.sd3_dit(pipeline.transformer.state_dict()))
    tensors |= single_files.prefixed("first_stage_model.", single_files.autoencoder(pipeline.vae.state_dict()))
    checkpoint = open_files(CheckpointSource(save(tensors, tmp_path / "tuned.safetensors"), folder))
    for network in family_of(checkpoint).networks(checkpoint, FP32):
        consistency.check_weights(network, checkpoint.weights(network.weights))
    for name in ("transformer", "vae"):
        state, weights = getattr(pipeline, name).state_dict(), checkpoint.weights(name)
        assert all(torch.equal(weights.read(key), tensor) for key, tensor in state.items())


def test_what_the_base_lacks_too_is_named(random_schnell: Path, tmp_path: Path) -> None:
    file = save_dit(random_flux.schnell(), tmp_path / "dit.safetensors")
    rest = r"text_encoder, text_encoder_2, tokenizer, tokenizer_2, vae missing[\s\S]*base=.FOLDER"
    with pytest.raises(UserError, match=rest):
        open_files(CheckpointSource(file))
    base = tmp_path / "base"
    shutil.copytree(random_schnell, base)
    shutil.rmtree(base / "tokenizer_2")
    with pytest.raises(UserError, match=r"^tokenizer_2 missing"):
        open_files(CheckpointSource(file, base))
    vae = save(single_files.autoencoder(random_flux.schnell().vae.state_dict()), tmp_path / "ae.safetensors")
    with pytest.raises(UserError, match=r"holds no DiT, only vae[\s\S]*base=.FOLDER"):
        open_files(CheckpointSource(vae))
    assert open_files(CheckpointSource(vae, random_schnell)).pipeline == "FluxPipeline"
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusion3Pipeline"}))
    with pytest.raises(UserError, match=r"of a FluxPipeline, and .* is a StableDiffusion3Pipeline"):
        open_files(CheckpointSource(file, base))
    with pytest.raises(UserError, match="base is for a checkpoint in one file or"):
        open_files(CheckpointSource(random_schnell, base))


def test_options_that_do_not_go_together(random_schnell: Path, tmp_path: Path) -> None:
    lora = save_lora(tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="leave out base and loras"):
        export_checkpoint(CheckpointSource(random_schnell, loras=((lora, 1.0),), random_weights=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_strength_or_file_is_another_source(random_schnell: Path, tmp_path: Path) -> None:
    file, lora = save_dit(random_flux.schnell(), tmp_path / "a.safetensors"), save_lora(tmp_path / "b.safetensors")
    seen = {
        fingerprint(CheckpointSource(file)),
        fingerprint(CheckpointSource(file, random_schnell)),
        fingerprint(CheckpointSource(file, random_schnell, ((lora, 1.0),))),
        fingerprint(CheckpointSource(file, random_schnell, ((lora, 0.5),))),
        fingerprint(CheckpointSource(random_schnell)),
    }
    os.utime(save_lora(lora, fill=2.0), ns=(0, 0))  # a file system's clock may be slower than this test
    seen.add(fingerprint(CheckpointSource(file, random_schnell, ((lora, 0.5),))))
    assert len(seen) == 6
