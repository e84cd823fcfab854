"""Weights in safetensors files, found by name and read one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ditforge.errors import UserError

if TYPE_CHECKING:
    import torch

SINGLE_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")


@dataclass(frozen=True)
class Weights:
    """The tensors of one network: `shards` says which file holds which tensor, `shapes` how large it is."""

    folder: Path
    shards: dict[str, Path]
    shapes: dict[str, tuple[int, ...]]

    def find(self, names: Iterable[str], prefixes: Iterable[str] = ()) -> str | None:
        """The first of `names` that is there, as it is or behind one of the prefixes; None if none is."""
        prefixes = ("", *prefixes)
        return next((p + name for name in names for p in prefixes if p + name in self.shards), None)

    def read(self, name: str, factor: float = 1.0) -> torch.Tensor:
        """The tensor `name`, read from its file; times `factor` in float32, so that a power of two loses no digit."""
        from safetensors import safe_open

        with safe_open(self.shards[name], framework="pt") as file:
            tensor = file.get_tensor(name)
        return tensor if factor == 1 else tensor.float() * factor


def open_weights(folder: Path) -> Weights:
    """The weights in `folder`: one safetensors file, or shards with an index. No tensor is read.

    Raises UserError if a file is missing or truncated, or if only pickled weights are there.
    """
    files = [folder / name for name in SINGLE_FILES if (folder / name).is_file()] or _shards(folder)
    shards: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in _read_header(file).items():
            shards[name], shapes[name] = file, shape
    return Weights(folder, shards, shapes)


def _shards(folder: Path) -> list[Path]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if not indices:
        pickled = next((path for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern)), None)
        found = f"only {pickled.name}, which is pickled and can run code when opened" if pickled else "no weights"
        raise UserError(f"{folder} has {found}", f"copy {SINGLE_FILES[0]} or {SINGLE_FILES[1]} into it")
    try:
        names = sorted(set(json.loads(indices[0].read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{indices[0]} is damaged: {error!r}", "copy it again") from error
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: {indices[0].name} names it", "copy the shard again")
    return [folder / name for name in names]


def _read_header(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise UserError(f"{file} ({size} bytes) is truncated or damaged: {error}", "copy the file again") from error
