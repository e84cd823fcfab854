"""The ways in which checkpoints store the same weights: each gives the same graph."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from ditforge.export.checkpoint import consistency
from ditforge.export.checkpoint.diffusers_folder import open_checkpoint
from ditforge.export.families import flux
from ditforge.export.onnx_export import export_network
from ditforge.export.quantisation.precision import FP32


def export_clip(folder: Path, out: Path) -> dict[str, bytes]:
    """CLIP's graph and weights as `ditforge export` checks and writes them."""
    checkpoint = open_checkpoint(folder)
    clip = next(network for network in flux.networks(checkpoint, FP32) if network.name == "clip")
    consistency.check_weights(clip, checkpoint.weights(clip.weights))
    out.mkdir()
    export_network(clip, checkpoint, out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def checkpoint(random_schnell: Path, tmp_path: Path) -> Path:
    """A copy of the random checkpoint."""
    return Path(shutil.copytree(random_schnell, tmp_path / "checkpoint"))


def test_shards_give_the_same_bytes(random_schnell: Path, checkpoint: Path, tmp_path: Path) -> None:
    clip = checkpoint / "text_encoder"
    model = CLIPTextModel.from_pretrained(clip)
    (clip / "model.safetensors").unlink()
    model.save_pretrained(clip, max_shard_size="100KB")
    assert not (clip / "model.safetensors").exists()
    weight_map = json.loads((clip / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    assert export_clip(checkpoint, tmp_path / "sharded") == export_clip(random_schnell, tmp_path / "whole")


def test_prefixed_keys_give_the_same_bytes(random_schnell: Path, checkpoint: Path, tmp_path: Path) -> None:
    """transformers 4 put `text_model.` before CLIP's keys, and every published FLUX checkpoint has it."""
    file = checkpoint / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    plain = checkpoint.with_name("plain")
    shutil.copytree(checkpoint, plain)
    save_file(
        {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()},
        plain / "text_encoder" / "model.safetensors",
    )
    assert export_clip(checkpoint, tmp_path / "prefixed") == export_clip(plain, tmp_path / "bare")
