"""Shared between the rooms' tests: checkpoints, and what the stages make of them, each made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import random_flux

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def flux_tiny() -> Path:
    """The trained checkpoint in the repository."""
    return ROOT / "models" / "flux-tiny"


@pytest.fixture(scope="session")
def random_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised checkpoint that shares no size with flux-tiny, and embeds no guidance."""
    return random_flux.save_schnell(tmp_path_factory.mktemp("checkpoint"))


def export(checkpoint: Path, out: Path, precision: str) -> Path:
    from ditforge.export.onnx_export import export_checkpoint

    export_checkpoint(checkpoint, out, precision)
    return out


@pytest.fixture(scope="session")
def schnell_onnx(random_schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The random checkpoint, and its fp32 export."""
    return random_schnell, export(random_schnell, tmp_path_factory.mktemp("onnx") / "schnell", "fp32")


@pytest.fixture(scope="session")
def flux_tiny_onnx(flux_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The trained checkpoint, and its fp32 export."""
    return flux_tiny, export(flux_tiny, tmp_path_factory.mktemp("onnx") / "flux-tiny", "fp32")
