"""Engines are loaded and run here, whatever compiled them."""

from __future__ import annotations

from pathlib import Path

from ditforge import manifest
from ditforge.engines.compiler import Engine, find_compiler
from ditforge.manifest import File


def load_engine(folder: Path, files: dict[str, File], compiler: str, target: str, version: str = "") -> Engine:
    """Load an engine that `compiler` (of `version`, if it is known) made for `target` from its files in `folder`.

    Raises UserError if a file is missing or not what the manifest says, or if the engine cannot be run here.
    """
    manifest.check_files(
        folder, files, fix="ditforge build ONNX_DIR --gpu GPU --out DIR   again, and then ditforge repo"
    )
    return find_compiler(compiler).load([folder / name for name in files], target, version)
