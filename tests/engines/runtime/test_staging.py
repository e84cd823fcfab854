"""Weights go through pieces of memory that several threads fill: here to the machine's own memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditforge.engines.runtime import staging, weights_reader
from ditforge.engines.runtime.staging import Staging
from ditforge.engines.runtime.weights_reader import WeightsReader

TENSORS = {f"t{number}": torch.randn(number, 37) for number in (0, 1, 5, 300)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file whose tensors are many times what all pieces hold."""
    monkeypatch.setattr(weights_reader, "CHUNK", 100)
    monkeypatch.setattr(staging, "CHUNK", 100)
    monkeypatch.setattr(staging, "PIECES", 3)
    save_file(TENSORS, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def places() -> list[torch.Tensor]:
    return [torch.zeros(tensor.numel() * 4, dtype=torch.uint8) for tensor in TENSORS.values()]


def test_all_weights_arrive(file: Path) -> None:
    stage = Staging()
    with WeightsReader(file) as reader:
        for _ in range(3):
            there = places()
            stage.fill(reader, [*TENSORS], there)
            for tensor, place in zip(TENSORS.values(), there, strict=True):
                assert torch.equal(place.view(torch.float32).view(tensor.shape), tensor)


def test_pieces_are_there_again_after_a_file_that_is_cut_short(file: Path) -> None:
    stage = Staging()
    with WeightsReader(file) as reader:
        os.truncate(file, file.stat().st_size - 40_000)  # meanwhile
        for _ in range(2):
            with pytest.raises(OSError, match="the file ends after"):
                stage.fill(reader, [*TENSORS], places())
    assert stage.free.qsize() == 3
