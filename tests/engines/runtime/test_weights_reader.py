"""Weights are read from a file by several threads, each a part at a time."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ditforge.engines.runtime import weights_reader
from ditforge.engines.runtime.weights_reader import WeightsReader

TENSORS = {
    "a": torch.randn(7, 11).to(torch.bfloat16),
    "b": torch.randn(3),
    "c": torch.arange(1000, dtype=torch.int32).reshape(10, 100),
    "empty": torch.zeros(0, 4),
    "d": torch.randn(300).to(torch.float8_e4m3fn),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "weights.safetensors", {"format": "pt"})
    return tmp_path / "weights.safetensors"


def places(names: list[str]) -> list[np.ndarray]:
    return [np.zeros(TENSORS[name].numel() * TENSORS[name].element_size(), np.uint8) for name in names]


@pytest.mark.parametrize("chunk", [1 << 20, 7])
def test_tensors_are_read_in_parts(file: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_reader, "CHUNK", chunk)
    names = ["d", "empty", "a", "c", "b"]
    with WeightsReader(file) as reader:
        read = places(names)
        reader.read(names, read)
        for name, bytes_read in zip(names, read, strict=True):
            assert (reader.dtypes[name], reader.shapes[name]) == (TENSORS[name].dtype, tuple(TENSORS[name].shape))
            expected = TENSORS[name].reshape(-1).view(torch.uint8).numpy()
            np.testing.assert_array_equal(bytes_read, expected, err_msg=name)


def test_a_file_that_is_cut_short(file: Path) -> None:
    with WeightsReader(file) as reader:
        os.truncate(file, file.stat().st_size - 400)  # meanwhile
        with pytest.raises(OSError, match="the file ends after"):
            reader.read([*TENSORS], places([*TENSORS]))
    with pytest.raises(SafetensorError):
        WeightsReader(file)
