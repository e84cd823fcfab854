"""A LoRA that is given as a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditforge.errors import UserError
from ditforge.export.checkpoint.adapters.folder import adapter_file, name_of
from ditforge.export.checkpoint.source import CheckpointSource, fingerprint, parse_lora


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        (("adapter_model.safetensors", "adapter_config.json", "z.safetensors"), "adapter_model.safetensors"),
        (("pytorch_lora_weights.safetensors", "a.safetensors"), "pytorch_lora_weights.safetensors"),
        (("style.safetensors", "README.md", "checkpoint-10/style.safetensors"), "style.safetensors"),
        (("deep/style.safetensors",), "deep/style.safetensors"),
    ],
)
def test_the_file(files: tuple[str, ...], taken: str, tmp_path: Path) -> None:
    assert adapter_file(fill(tmp_path, *files)) == tmp_path / taken
    assert adapter_file(tmp_path / files[0]) == tmp_path / files[0]
    assert parse_lora(f"{tmp_path}:0.5") == (tmp_path, 0.5)
    assert parse_lora(str(tmp_path)) == (tmp_path, 1.0)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("a.safetensors", "b.safetensors"), "has 2 .safetensors files: a.safetensors, b"),
        (("adapter_model.bin", "adapter_config.json"), "only adapter_model.bin, which is pickled"),
        (("README.md",), "has no .safetensors file"),
    ],
)
def test_no_file(files: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        adapter_file(fill(tmp_path, *files))


def test_names_for_people(tmp_path: Path) -> None:
    assert name_of(tmp_path / "style" / "adapter_model.safetensors") == "style/adapter_model.safetensors"
    assert name_of(tmp_path / "style.safetensors") == "style.safetensors"


def test_the_settings_beside_a_file_count(tmp_path: Path) -> None:
    fill(tmp_path, "model/model_index.json", "peft/adapter_model.safetensors", "peft/adapter_config.json")
    source = CheckpointSource(tmp_path / "model", loras=((tmp_path / "peft" / "adapter_model.safetensors", 1.0),))
    before = fingerprint(source)
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    assert fingerprint(source) != before
