"""The training script in miniature, and the committed checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import FluxPipeline
from evaluate import load_pipeline, paint
from judge import judge
from pictures import largest_difference
from scenes import held_out_captions


def test_a_short_run_writes_a_folder_that_the_stock_pipeline_loads(models_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(models_folder / "train_flux_tiny.py"), "--out", str(tmp_path / "flux")]
    options = ["--work", str(tmp_path / "work"), "--scale", "0.0001", "--device", "cpu"]
    subprocess.run(command + options, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads((tmp_path / "flux" / "training.json").read_text())
    assert set(report["seconds"]) == {"autoencoder", "reading", "flow", "guidance"}
    pipeline = load_pipeline(tmp_path / "flux", "cpu")
    assert isinstance(pipeline, FluxPipeline)
    assert pipeline.transformer.config.guidance_embeds and pipeline.transformer.config.in_channels == 64
    assert pipeline.text_encoder.config.eos_token_id == pipeline.tokenizer.eos_token_id
    with torch.no_grad():
        picture = pipeline("a red circle", height=64, width=64, num_inference_steps=1, max_sequence_length=64).images[0]
    assert picture.size == (64, 64)


def test_the_committed_checkpoint_loads_and_follows_the_guidance(models_folder: Path) -> None:
    pipeline = load_pipeline(models_folder / "flux-tiny", "cpu")
    prompt = held_out_captions(1, seed=7)
    weak, strong = (paint(pipeline, prompt, seed=7, guidance=scale)[0] for scale in (1.0, 5.0))
    assert weak.size == (128, 128)
    assert largest_difference(weak, strong) > 8  # far more than rounding


def test_the_committed_checkpoint_paints_held_out_captions(models_folder: Path) -> None:
    pipeline = load_pipeline(models_folder / "flux-tiny", "cpu")
    captions = held_out_captions(24, seed=7)
    pictures = paint(pipeline, captions, seed=7, batch=12)
    right = sum(judge(picture, text).correct for picture, text in zip(pictures, captions, strict=True))
    assert right >= 0.85 * len(captions)
