"""FLUX.1-dev's DiT in its real width, cut to a few blocks: what `make full-size` does to all 57."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import ditforge

from ditforge import manifest
from ditforge.export.checkpoint.diffusers_folder import CONFIGS

DOUBLE, SINGLE = 339_834_368, 141_569_280  # FLUX.1's parameters in a block of either kind
DOUBLES, SINGLES = 1, 2
CUT = {
    "transformer": {"num_layers": DOUBLES, "num_single_layers": SINGLES},
    # What stands around the DiT is made small, but for the widths that it takes.
    "text_encoder": {"num_hidden_layers": 1, "vocab_size": 600},
    "text_encoder_2": {"num_layers": 1, "d_ff": 64, "num_heads": 2, "vocab_size": 300},
    "vae": {"block_out_channels": [16, 16, 32, 32], "norm_num_groups": 8, "layers_per_block": 1},
}
SEGMENTS = 2


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """The configurations of flux.1-dev, with fewer blocks."""
    folder = tmp_path / "cut"
    shutil.copytree(CONFIGS / "flux.1-dev", folder)
    for component, changes in CUT.items():
        path = folder / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.matrix
def test_blocks_are_exported_in_8_bits_and_compiled_in_segments(cut: Path, tmp_path: Path) -> None:
    done = ditforge(*("export", cut, "--random-weights", "--precision", "fp8-weights", "--out", "onnx"), cwd=tmp_path)
    assert done.code == 0, done.err
    component = manifest.read(tmp_path / "onnx", "onnx").components["dit"]
    weights = component.files["dit.onnx.data"].size
    assert 1 < weights / (DOUBLES * DOUBLE + SINGLES * SINGLE) < 2

    build = ("build", "onnx", "--gpu", "rtx4090", "--segments", str(SEGMENTS), "--out", "engines")
    done = ditforge(*build, cwd=tmp_path)
    assert done.code == 0, done.err
    built = manifest.read(tmp_path / "engines", "engines")
    files = [built.components["dit"].files[file].size for part in built.engines["dit"].segment_files for file in part]
    assert len(files) == SEGMENTS
    assert sum(files) == pytest.approx(weights, rel=0.03)
    assert max(files) < 0.7 * sum(files)
