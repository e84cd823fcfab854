"""Builds: made once, made again with a reason, whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from onnx import load as load_graph

from ditforge import manifest
from ditforge.engines.build import build
from ditforge.engines.compilers import find_compiler, onnxruntime as ort_compiler
from ditforge.engines.runtime.loading import load_engine
from ditforge.engines.verify import compare, verify_files
from ditforge.errors import UserError


@pytest.fixture
def onnx(schnell, tmp_path: Path) -> Path:
    """A copy of an export that a test may change."""
    return shutil.copytree(schnell.onnx, tmp_path / "onnx")


@pytest.fixture
def engines(schnell, tmp_path: Path) -> Path:
    """A copy of a build that a test may change."""
    return shutil.copytree(schnell.engines, tmp_path / "engines")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_the_second_build_does_nothing(schnell, engines: Path) -> None:
    before = contents(engines)
    inode = engines.stat().st_ino
    built = build(schnell.onnx, engines)
    assert built.rebuilt == {}
    assert contents(engines) == before
    assert engines.stat().st_ino == inode


def test_engines_are_optimised_graphs(schnell) -> None:
    before = ort.InferenceSession(schnell.onnx / "dit.onnx")
    graphs = [load_graph(folder / "dit.onnx", load_external_data=False) for folder in (schnell.onnx, schnell.engines)]
    engine = manifest.read(schnell.engines, "engines")
    optimised = schnell.engines / "dit.onnx"
    assert len(graphs[1].graph.node) < len(graphs[0].graph.node)  # some of them are fused
    assert {i.name for i in ort.InferenceSession(optimised).get_inputs()} == {i.name for i in before.get_inputs()}
    assert engine.engines["dit"].compiler_version == ort.__version__


def test_a_change_rebuilds_what_changed_and_says_why(schnell, engines: Path, monkeypatch) -> None:
    settings = {"optimization": "basic", "quantisation": "computed as floats"}
    monkeypatch.setattr(ort_compiler, "COMPILER", replace(ort_compiler.COMPILER, settings=lambda: settings))
    built = build(schnell.onnx, engines)
    assert set(built.rebuilt) == set(built.manifest.engines)
    assert built.rebuilt["dit"] == "optimization was extended, is basic"


def test_another_compiler_version_rebuilds(schnell, engines: Path, monkeypatch) -> None:
    monkeypatch.setattr(ort_compiler, "COMPILER", replace(ort_compiler.COMPILER, version=lambda: "99.0"))
    reason = build(schnell.onnx, engines).rebuilt["t5"]
    assert reason == f"compiler_version was {ort.__version__}, is 99.0"


def test_changed_weights_rebuild_one_engine(onnx: Path, engines: Path) -> None:
    flip_a_byte(onnx / "clip.onnx.data")
    path = onnx / "manifest.json"
    described = json.loads(path.read_text())
    described["components"]["clip"]["files"]["clip.onnx.data"] = manifest.describe(onnx / "clip.onnx.data").model_dump()
    path.write_text(json.dumps(described))
    before = contents(engines)
    assert build(onnx, engines).rebuilt == {"clip": "sha256 of clip.onnx.data changed"}
    after = contents(engines)
    assert {name for name in after if after[name] != before[name]} == {"clip.onnx.data", "manifest.json"}


def test_a_lost_engine_is_rebuilt(schnell, engines: Path) -> None:
    (engines / "dit.onnx").unlink()
    assert build(schnell.onnx, engines).rebuilt == {"dit": "dit.onnx is missing or truncated"}
    assert verify_files(engines) == verify_files(schnell.engines)


def test_an_interrupted_build_leaves_what_was_there(schnell, tmp_path: Path, monkeypatch) -> None:
    def interrupt(component: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(schnell.onnx, tmp_path / "engines", progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dit.onnx", "dit.onnx.data", "tokenizer/t5.json"])
def test_a_damaged_graph_is_refused(onnx: Path, tmp_path: Path, name: str) -> None:
    flip_a_byte(onnx / name)
    with pytest.raises(UserError, match=name) as error:
        build(onnx, tmp_path / "engines")
    assert "ditforge export" in error.value.fix or "again" in error.value.fix
    assert {path.name for path in tmp_path.iterdir()} == {"onnx"}


@pytest.mark.parametrize("name", ["dit.onnx", "vae_decoder.onnx.data", "tokenizer/clip.json"])
def test_verify_finds_a_flipped_byte(engines: Path, name: str) -> None:
    assert verify_files(engines) == 12
    flip_a_byte(engines / name)
    with pytest.raises(UserError, match=name):
        verify_files(engines)


def test_a_damaged_engine_is_not_loaded(engines: Path) -> None:
    built = manifest.read(engines, "engines")
    flip_a_byte(engines / "clip.onnx.data")
    with pytest.raises(UserError, match="damaged"):
        load_engine(engines, built.components["clip"].files, built.engines["clip"])


def test_compare_sees_what_the_engines_compute(schnell) -> None:
    differences = {(d.component, d.output): d for d in compare(schnell.engines, schnell.onnx)}
    assert set(differences) == {
        ("clip", "pooled_embeds"),
        ("t5", "prompt_embeds"),
        ("dit", "velocity"),
        ("vae_decoder", "image"),
        ("vae_encoder", "latents"),
    }
    assert all(d.relative < 1e-4 and d.cosine > 0.9999 for d in differences.values())


def test_compare_sees_wrong_weights(schnell, engines: Path) -> None:
    """An engine with other weights, whose manifest fits it: only running it tells."""
    data = engines / "dit.onnx.data"
    weights = np.fromfile(data, np.float32)
    weights[weights.size // 2 :] *= 1.1
    weights.tofile(data)
    path = engines / "manifest.json"
    described = json.loads(path.read_text())
    described["components"]["dit"]["files"]["dit.onnx.data"] = manifest.describe(data).model_dump()
    path.write_text(json.dumps(described))
    worst = max(compare(engines, schnell.onnx), key=lambda d: d.relative)
    assert (worst.component, worst.relative > 0.01) == ("dit", True)


def test_bf16_is_refused_on_a_cpu(onnx: Path, tmp_path: Path) -> None:
    path = onnx / "manifest.json"
    path.write_text(path.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    with pytest.raises(UserError, match="bf16") as error:
        build(onnx, tmp_path / "engines")
    assert "--precision fp32" in error.value.fix


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="onnxruntime"):
        find_compiler("tensorflow")
