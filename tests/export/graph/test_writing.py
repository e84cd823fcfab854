"""Polygraphy, NVIDIA's own tool around TensorRT and ONNX Runtime, reads and runs every exported graph."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import PATIENCE

from ditforge import manifest

NETWORKS = ("clip", "t5", "dit", "vae_decoder", "vae_encoder")
SIZES = {"batch": 2, "latent_height": 8, "latent_width": 12, "height": 64, "width": 96}


def polygraphy(*arguments: str) -> str:
    """What a command of Polygraphy prints; fails if it fails."""
    command = [str(Path(sys.executable).parent / "polygraphy"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NETWORKS)
def test_inspect_model(schnell, name: str) -> None:
    described = manifest.read(schnell.onnx, "onnx").components[name]
    shown = polygraphy("inspect", "model", str(schnell.onnx / f"{name}.onnx"))
    assert all(tensor in shown for tensor in (*described.inputs, *described.outputs))


@pytest.mark.parametrize("name", NETWORKS)
def test_run_in_onnx_runtime(schnell, name: str) -> None:
    inputs = manifest.read(schnell.onnx, "onnx").components[name].inputs
    shapes = [
        f"{tensor}:[{','.join(str(SIZES.get(dim, dim)) for dim in described.shape)}]"
        for tensor, described in inputs.items()
    ]
    graph = str(schnell.onnx / f"{name}.onnx")
    assert "PASSED" in polygraphy("run", graph, "--onnxrt", "--input-shapes", *shapes)
