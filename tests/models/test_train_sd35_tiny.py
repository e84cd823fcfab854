"""The training script of sd35-tiny in miniature, and the committed checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from evaluate import load_pipeline, paint
from judge import judge
from scenes import held_out_captions


def test_a_short_run_writes_a_folder_that_the_stock_pipeline_loads(models_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(models_folder / "train_sd35_tiny.py"), "--out", str(tmp_path / "sd35")]
    options = ["--work", str(tmp_path / "work"), "--scale", "0.0001", "--device", "cpu"]
    subprocess.run(command + options, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report = json.loads((tmp_path / "sd35" / "training.json").read_text())
    assert set(report["seconds"]) == {"reading", "flow"}
    assert sum(path.stat().st_size for path in (tmp_path / "sd35").rglob("*")) < 20e6
    pipeline = load_pipeline(tmp_path / "sd35", "cpu")
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    assert pipeline.transformer.config.qk_norm == "rms_norm" and pipeline.transformer.config.dual_attention_layers
    assert pipeline.text_encoder.config.hidden_size != pipeline.text_encoder_2.config.hidden_size
    with torch.no_grad():
        picture = pipeline("a red circle", height=64, width=64, num_inference_steps=1, max_sequence_length=64).images[0]
    assert picture.size == (64, 64)


def test_the_committed_checkpoint_is_small_and_knows_no_folder_of_ours(models_folder: Path) -> None:
    files = [path for path in (models_folder / "sd35-tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    configs = [path.read_text() for path in files if path.name == "config.json"]
    assert len(configs) == 5 and not any("_name_or_path" in config for config in configs)


@pytest.mark.parametrize("t5", [True, False])
def test_the_committed_checkpoint_paints_held_out_captions(models_folder: Path, t5: bool) -> None:
    pipeline = load_pipeline(models_folder / "sd35-tiny", "cpu")
    if not t5:
        pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    captions = held_out_captions(12, seed=7)
    pictures = paint(pipeline, captions, seed=7, batch=12)
    right = sum(judge(picture, text).correct for picture, text in zip(pictures, captions, strict=True))
    assert right >= 0.85 * len(captions)
