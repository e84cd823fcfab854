"""Shared between the rooms' tests: checkpoints, and what the stages make of them, each made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import random_flux

from ditforge.triton_repo.server import Server, start

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def flux_tiny() -> Path:
    """The trained checkpoint in the repository."""
    return ROOT / "models" / "flux-tiny"


@pytest.fixture(scope="session")
def random_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised checkpoint that shares no size with flux-tiny, and embeds no guidance."""
    return random_flux.save_schnell(tmp_path_factory.mktemp("checkpoint"))


@dataclass(frozen=True)
class Stages:
    """A checkpoint, and the folders that the stages make of it."""

    checkpoint: Path
    onnx: Path
    engines: Path
    repository: Path


def run_stages(checkpoint: Path, out: Path) -> Stages:
    """Export in fp32, build for the CPU, write the repository."""
    from ditforge.engines.build import build
    from ditforge.export.onnx_export import export_checkpoint
    from ditforge.triton_repo.repository import write_repository

    stages = Stages(checkpoint, out / "onnx", out / "engines", out / "repo")
    export_checkpoint(checkpoint, stages.onnx)
    build(stages.onnx, stages.engines, "cpu")
    write_repository(stages.engines, stages.repository)
    return stages


@pytest.fixture(scope="session")
def schnell(random_schnell: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """The random checkpoint through every stage."""
    return run_stages(random_schnell, tmp_path_factory.mktemp("schnell"))


@pytest.fixture(scope="session")
def tiny(flux_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """flux-tiny through every stage."""
    return run_stages(flux_tiny, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def schnell_server(schnell: Stages) -> Iterator[Server]:
    """A server of the random checkpoint."""
    with start(schnell.repository, port=0) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_server(tiny: Stages) -> Iterator[Server]:
    """A server of flux-tiny."""
    with start(tiny.repository, port=0) as server:
        yield server
