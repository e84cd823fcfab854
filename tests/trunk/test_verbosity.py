"""--quiet and --verbose, of any command."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer
from command_line import assert_error, run_here

from ditforge import verbosity
from ditforge.cli import app

FLAGS = {"--verbose", "--quiet"}


def test_every_command_takes_both() -> None:
    for command in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        assert {flag for parameter in command.params for flag in parameter.opts} >= FLAGS


def test_quiet_prints_errors_and_results_alone(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engines, out = shutil.copytree(schnell.engines, tmp_path / "engines"), tmp_path / "repo"
    (engines / "clip.onnx").unlink()
    build = ["build", str(schnell.onnx), "--out", str(engines)]
    export = ["export", str(schnell.checkpoint), "--out", str(schnell.onnx)]
    for command in (build, ["repo", str(engines), "--out", str(out)], export):
        done = run_here([*command, "--quiet"], monkeypatch, capfd)
        assert (done.code, done.out, done.err) == (0, "", "")
    done = run_here([*build, "--quiet", "--json"], monkeypatch, capfd)
    assert done.out.startswith("{") and done.err == ""
    assert run_here(["inspect", str(out), "-q"], monkeypatch, capfd).out
    assert_error(run_here(["inspect", "nowhere", "-q"], monkeypatch, capfd), "nowhere")
    assert "up to date" in run_here(build, monkeypatch, capfd).out  # the next command is not quiet


def test_verbose_says_what_is_done_and_why(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engines = shutil.copytree(schnell.engines, tmp_path / "engines")
    (engines / "clip.onnx").unlink()
    done = run_here(["build", str(schnell.onnx), "--out", str(engines), "--verbose"], monkeypatch, capfd)
    assert "INFO ditforge.engines.build: clip: compiled (clip.onnx is missing or truncated)\n" in done.err
    assert "INFO ditforge.engines.build: dit: kept\n" in done.err
    assert "INFO" not in run_here(["build", str(schnell.onnx), "--out", str(engines)], monkeypatch, capfd).err


@pytest.mark.parametrize(
    "arguments", [["gpus", "--verbose", "--quiet"], ["--verbose", "gpus", "-q"], ["-v", "-q", "gpus"]]
)
def test_both_at_once(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert_error(run_here(arguments, monkeypatch, capfd), "--verbose and --quiet")


def test_before_the_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, quiet in ((["-q", "gpus"], True), (["gpus"], False), (["gpus", "-q"], True)):
        assert run_here(arguments, monkeypatch, capfd).code == 0
        assert verbosity.is_quiet() == quiet
