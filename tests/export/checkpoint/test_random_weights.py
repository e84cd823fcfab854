"""`--random-weights`: values, tokenizers and names; and what exports of any size do: go on, and look at the disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
import torch
from command_line import assert_error, ditforge
from tokenizers import Tokenizer

from ditforge import manifest
from ditforge.errors import DitforgeWarning, UserError
from ditforge.export import families, onnx_export
from ditforge.export.checkpoint.diffusers_folder import CONFIGS
from ditforge.export.checkpoint.random_weights import BLOCK, random_checkpoint, random_tensor, random_weights
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.families import flux
from ditforge.export.graph import resuming
from ditforge.export.onnx_export import ExportOptions, export_checkpoint
from ditforge.export.quantisation.precision import FP32, parse_precision

BF16 = parse_precision("bf16")
PROMPT = "A red circle, é and 💡"
CLIP_VOCABULARY, T5_VOCABULARY = 600, 300  # the smallest that bytes fit in are 514 and 260


@pytest.fixture
def bare(random_schnell: Path, tmp_path: Path) -> Path:
    """The random checkpoint's configurations, with neither weights nor tokenizers."""
    folder = tmp_path / "bare"
    shutil.copytree(random_schnell, folder, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*"))
    for component, size in {"text_encoder": CLIP_VOCABULARY, "text_encoder_2": T5_VOCABULARY}.items():
        path = folder / component / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": size, "eos_token_id": 2}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(folder: Path, name: str, prompt: str) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer" / f"{name}.json")).encode(prompt).ids


def test_values_have_a_realistic_scale() -> None:
    matrix = random_tensor("layer.weight", (300, 400)).float()
    assert matrix.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert abs(matrix.mean().item()) < 1e-3
    kernel = random_tensor("conv.weight", (64, 32, 3, 3)).float()
    assert kernel.std().item() == pytest.approx((32 * 9) ** -0.5, rel=0.05)
    assert random_tensor("layer.bias", (7,)).tolist() == [0] * 7
    assert random_tensor("norm.weight", (7,)).tolist() == [1] * 7
    assert random_tensor("layer.weight", (2, 2)).dtype == torch.bfloat16


def test_values_are_decided_by_name_and_seed_alone() -> None:
    shape = (40, 50)
    first = random_tensor("a", shape)
    other = random_tensor("b", shape)
    assert torch.equal(random_tensor("a", shape), first)
    assert not torch.equal(other, first)
    assert abs(torch.corrcoef(torch.stack([first.flatten(), other.flatten()]).float())[0, 1]) < 0.1
    assert not torch.equal(random_tensor("a", shape, seed=1), first)


def test_a_tensor_larger_than_the_block_does_not_repeat_in_step() -> None:
    rows = 4097
    tensor = random_tensor("large", (rows, 4096))  # a few numbers more than BLOCK
    assert tensor.numel() > BLOCK
    assert tensor.float().std().item() == pytest.approx(4096**-0.5, rel=0.01)
    assert torch.unique(tensor[:, :4], dim=0).shape[0] == rows


def test_the_published_models_by_name_have_tokenizers_of_the_real_sizes() -> None:
    for name in ("flux.1-dev", "sd3.5-medium"):
        with random_checkpoint(Path(name)) as opened:
            assert opened.name == name
            family = families.family_of(opened)
            for tokenizer in family.read_tokenizers(opened):
                clip = tokenizer.name.startswith("clip")
                assert len(tokenizer.tokenizer) == (49408 if clip else 32128)
                assert tokenizer.max_tokens == (77 if clip else 512 if "flux" in name else 256)
                encoded = tokenizer.tokenizer(PROMPT).input_ids
                assert len(set(encoded)) > 10
                assert encoded[-1] == (49407 if clip else 1)
                assert tokenizer.tokenizer.pad_token_id == {"clip_g": 0, "t5": 0}.get(tokenizer.name, 49407)
            dit = next(network for network in family.networks(opened, BF16) if network.name == "dit")
            weights = random_weights(dit, opened)
            assert sum(torch.Size(shape).numel() for shape in weights.shapes.values()) > 2e9
        assert not opened.folder.exists()


def test_a_model_without_weights_goes_through_to_numbers(bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    assert not export_checkpoint(CheckpointSource(bare, random_weights=True), out).fresh
    assert list(manifest.read(out, "onnx").components) == [
        "tokenizer",
        "clip",
        "t5",
        "dit",
        "vae_decoder",
        "vae_encoder",
    ]
    for name, output in {"clip": "pooled_embeds", "t5": "prompt_embeds"}.items():
        session = ort.InferenceSession(out / f"{name}.onnx", providers=["CPUExecutionProvider"])
        (made,) = session.run([output], {f"{name}_ids": [ids(out, name, PROMPT)]})
        assert 0.01 < made.std() < 100
        (other,) = session.run([output], {f"{name}_ids": [ids(out, name, "something else")]})
        assert abs(made - other).max() > 0.01
    assert export_checkpoint(CheckpointSource(bare, random_weights=True), out).fresh
    assert all(name.endswith(".json") for name in contents(bare))


def test_two_exports_are_the_same(two_networks: None, traced_anew: None, bare: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export_checkpoint(CheckpointSource(bare, random_weights=True), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_names_and_mistakes(bare: Path, tmp_path: Path) -> None:
    names = sorted(path.parent.name for path in CONFIGS.glob("*/model_index.json"))
    assert_error(ditforge("export", "flux.2", "--random-weights", "--out", "a", cwd=tmp_path), "flux.2", *names)
    with pytest.raises(UserError, match="leave out max_error"):
        export_checkpoint(
            CheckpointSource(bare, random_weights=True), tmp_path / "onnx", ExportOptions("fp8-weights", max_error=0.1)
        )
    path = bare / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with pytest.raises(UserError, match=r"vocabulary of 514.* has 100"):
        export_checkpoint(CheckpointSource(bare, random_weights=True), tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_a_disk_that_is_too_small(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * 10**6))
    with pytest.raises(UserError, match=r"takes 0\.05 GB, and .* has 0\.05 GB free"):
        export_checkpoint(CheckpointSource(bare, random_weights=True), tmp_path / "missing" / "onnx")
    assert sorted(os.listdir(tmp_path)) == before


class Stopped(Exception):
    """What interrupts an export here."""


@pytest.fixture
def two_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports consist of CLIP and T5 alone, which are traced in a second."""
    family = replace(flux.FAMILY, networks=lambda *args: flux.networks(*args)[:2])
    monkeypatch.setattr(flux, "FAMILY", family)


@pytest.fixture
def stopped_at_t5(two_networks: None, bare: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[str]]:
    """Begins an export and stops it at T5; returns a list that later gets the networks that are traced."""
    monkeypatch.setattr(resuming, "WORTH", 1)
    traced: list[str] = []
    trace = onnx_export.trace

    def note(network: Any) -> Any:
        traced.append(network.name)
        return trace(network)

    def stop(component: str, done: int, total: int) -> None:
        if component.startswith("t5 "):
            raise Stopped

    def begin(out: Path) -> list[str]:
        with pytest.raises(Stopped), pytest.warns(DitforgeWarning, match=r"clip .* stay in .*\.onnx\.unfinished"):
            export_checkpoint(CheckpointSource(bare, random_weights=True), out, progress=stop)
        monkeypatch.setattr(onnx_export, "trace", note)
        return traced

    return begin


def test_an_interrupted_export_goes_on(stopped_at_t5: Callable[[Path], list[str]], bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    traced = stopped_at_t5(out)
    assert sorted(os.listdir(tmp_path)) == [".onnx.unfinished", "bare"]
    said: list[tuple[str, int, int]] = []
    export_checkpoint(CheckpointSource(bare, random_weights=True), out, progress=lambda *args: said.append(args))
    assert traced == ["t5"]
    assert sorted(os.listdir(tmp_path)) == ["bare", "onnx"]
    for component in manifest.read(out, "onnx").components.values():
        manifest.check_files(out, component.files, "")
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)
    assert said[-1][1] == said[-1][2] == said[0][2]
    with random_checkpoint(bare) as opened:
        shapes = [random_weights(n, opened).shapes for n in flux.FAMILY.networks(opened, FP32)]
    assert said[0][2] == sum(4 * torch.Size(size).numel() for part in shapes for size in part.values())  # bytes


@pytest.mark.parametrize(("file", "change"), [("clip.onnx.data", b"x"), ("clip.json", b"{"), ("clip.onnx", None)])
def test_what_was_kept_and_is_damaged_is_made_again(
    stopped_at_t5: Callable[[Path], list[str]], bare: Path, tmp_path: Path, file: str, change: bytes | None
) -> None:
    traced = stopped_at_t5(tmp_path / "onnx")
    path = tmp_path / ".onnx.unfinished" / file
    content = path.read_bytes()
    path.unlink()
    if change:
        path.write_bytes(change if file.endswith("json") else content[:100] + change + content[101:])
    export_checkpoint(CheckpointSource(bare, random_weights=True), tmp_path / "onnx")
    assert traced == ["clip", "t5"]
    found = manifest.read(tmp_path / "onnx", "onnx")
    manifest.check_files(tmp_path / "onnx", found.components["clip"].files, "")
    assert sorted(os.listdir(tmp_path)) == ["bare", "onnx"]


def test_components_of_another_precision_are_not_taken_and_foreign_files_stay(
    stopped_at_t5: Callable[[Path], list[str]], bare: Path, tmp_path: Path
) -> None:
    traced = stopped_at_t5(tmp_path / "onnx")
    mine = tmp_path / ".onnx.unfinished" / "mine.txt"
    mine.write_text("mine")
    export_checkpoint(CheckpointSource(bare, random_weights=True), tmp_path / "onnx", ExportOptions("bf16"))
    assert traced == ["clip", "t5"]
    assert os.listdir(mine.parent) == ["mine.txt"]
