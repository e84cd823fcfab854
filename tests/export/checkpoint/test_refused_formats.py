"""Weights in other formats than those that are read: each is called by its name, and nothing in it is opened."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ditforge.errors import UserError
from ditforge.export.checkpoint.lazy_tensors import open_tensors
from ditforge.export.checkpoint.weights import open_weights


class Trap:
    """Whoever unpickles it makes the file `sprung`."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.sprung,)


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
FILES = {
    "pickled": lambda file: torch.save({"a.weight": torch.zeros(2, 2), "trap": Trap(file.with_name("sprung"))}, file),
    "pickled, old": lambda file: torch.save(
        {"a": Trap(file.with_name("sprung"))}, file, _use_new_zipfile_serialization=False
    ),
    "pickled by itself": lambda file: file.write_bytes(pickle.dumps({str(i): Trap(file) for i in range(99)}, 4)),
    "Git LFS": lambda file: file.write_text(LFS),
    "web page": lambda file: file.write_text("<!DOCTYPE html><html><body>Please log in</body></html>"),
}
NAMES = {"pickled, old": "pickled", "pickled by itself": "pickled"}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".gguf"])
def test_files_of_other_formats(kind: str, suffix: str, tmp_path: Path) -> None:
    """What a file begins with tells, not its name."""
    file = tmp_path / f"a{suffix}"
    FILES[kind](file)
    with pytest.raises(UserError, match=NAMES.get(kind, kind)) as error:
        open_tensors(file)
    assert str(file) in error.value.problem
    assert any(word in error.value.fix for word in (".safetensors", "bf16", "download"))
    shutil.copy(file, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=NAMES.get(kind, kind)):
        open_weights(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("key", "packer"),
    [
        ("weight.quant_state.bitsandbytes__nf4", r"bitsandbytes in 4 bits \(nf4, fp4\)"),
        ("weight.absmax", "bitsandbytes in 4 bits"),
        ("SCB", "bitsandbytes in 8 bits"),
        ("wscales", "Nunchaku"),
        ("qweight", "GPTQ or AWQ"),
        ("weight._data", "Quanto"),
    ],
)
def test_packed_weights(key: str, packer: str, tmp_path: Path) -> None:
    """In a single file and in a folder, whose shapes would only seem to be wrong."""
    tensors = {"blocks.0.attn.weight": torch.zeros(32, 1, dtype=torch.uint8), f"blocks.0.attn.{key}": torch.zeros(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    for read in (lambda: open_tensors(tmp_path / "model.safetensors"), lambda: open_weights(tmp_path)):
        with pytest.raises(UserError, match=packer) as error:
            read()
        assert f"it holds blocks.0.attn.{key}" in error.value.problem
        assert "ditforge export quantises it" in error.value.fix
