"""Every command in a folder that has been removed: one error says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import assert_error, run_here

from ditforge.errors import UserError
from ditforge.export.disk_space import check_space
from ditforge.triton_repo.server import start

ARGUMENTS = {
    "export": ["flux.1-dev", "--out", "x"],
    "calibrate": ["flux.1-dev", "--out", "x"],
    "build": ["onnx", "--out", "x"],
    "plan": ["flux.1-dev"],
    "verify": ["x"],
    "bench": ["x"],
    "repo": ["engines", "--out", "x"],
    "serve": ["repo"],
    "generate": ["a red circle"],
    "up": ["flux.1-dev"],
    "gpus": [],
    "doctor": [],
    "inspect": ["x"],
}


@pytest.fixture
def removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the current folder one that has been removed."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()


@pytest.mark.parametrize("command", ARGUMENTS)
@pytest.mark.usefixtures("removed")
def test_commands(command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    result = run_here([command, *ARGUMENTS[command]], monkeypatch, capfd)
    assert_error(result, "the current folder has been removed", "cd to a folder")


@pytest.mark.usefixtures("removed")
def test_in_python() -> None:
    with pytest.raises(UserError, match="the current folder has been removed"):
        check_space(Path("x"), 1)
    with pytest.raises(UserError, match="the current folder has been removed"):
        start(Path("x"))
