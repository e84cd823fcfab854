"""Which precision an export gets where none is named, what is recorded of it, and what `build` makes of that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import assert_error, run_here

import ditforge
from ditforge import manifest
from ditforge.engines.build import BuildOptions, build
from ditforge.engines.gpus import find_target
from ditforge.errors import UserError
from ditforge.export import onnx_export
from ditforge.export.onnx_export import ExportOptions
from ditforge.suited import suited


class Asked(Exception):
    """What an export was asked for, instead of making it."""


@pytest.mark.parametrize(
    ("gpu", "precision", "activations", "why"),
    [
        ("rtx4090", "fp8-weights", "bf16", "sm_89 has FP8"),
        ("rtx3060", "int8-weights", "bf16", "12 GiB"),
        ("rtx2080ti", "int8-weights", "fp16", "sm_75"),
        ("rtxa6000", "bf16", None, "48 GiB"),
        ("rtx4090,rtx2080ti", "int8-weights", "fp16", "sm_75"),
        ("cpu", "fp32", None, "CPU"),
        (None, None, None, 'gpu="GPU"'),
    ],
)
def test_what_suits_a_gpu(gpu: str | None, precision: str | None, activations: str | None, why: str) -> None:
    chosen, reason = suited(ExportOptions(), find_target(gpu) if gpu else None)
    assert (chosen.precision, chosen.activations) == (precision, activations)
    assert why in reason


def test_what_is_asked_for_stays() -> None:
    target = find_target("rtx4090")
    assert suited(ExportOptions("fp8-weights", "fp16"), target)[0] == ExportOptions("fp8-weights", "fp16")
    assert suited(ExportOptions(calibration=Path("ranges.json")), None)[0].precision == "fp8"
    with pytest.raises(UserError, match="sm_86 has no FP8"):
        suited(ExportOptions("fp8"), find_target("rtx3060"))


def test_export_for_a_gpu_on_the_command_line_and_in_python(
    random_schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[ExportOptions] = []

    def opened(checkpoint: object, origin: object, out: Path, options: ExportOptions, *args: object) -> None:
        seen.append(options)
        raise UserError("this is not exported")

    monkeypatch.setattr(onnx_export, "export_opened", opened)
    run_here(["export", str(random_schnell), "--gpu", "rtx2080ti", "--out", str(tmp_path)], monkeypatch, capfd)
    with pytest.raises(UserError, match="not exported"):
        ditforge.export_checkpoint(random_schnell, tmp_path, gpu="rtx2080ti")
    assert seen == [ExportOptions("int8-weights", "fp16")] * 2
    unknown = run_here(["export", "nowhere", "--gpu", "rtx4091", "--out", str(tmp_path)], monkeypatch, capfd)
    assert_error(unknown, "did you mean rtx4090")


def test_fp32_that_nobody_wanted(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is built for the CPU; for a GPU once fp32 is asked for, which exports nothing anew."""
    onnx = shutil.copytree(schnell.onnx, tmp_path / "onnx")
    described = json.loads((onnx / "manifest.json").read_text())
    assert described["origin"]["precision_choice"] == "asked for"
    described["origin"]["precision_choice"] = "by default"
    (onnx / "manifest.json").write_text(json.dumps(described))
    arguments = ["build", str(onnx), "--gpu", "rtx4090", "--out", str(tmp_path / "engines")]
    refused = run_here(arguments, monkeypatch, capfd)
    assert_error(refused, "is in fp32", "fp8-weights", "fix:   ditforge export CHECKPOINT --gpu rtx4090 --out DIR")
    assert ditforge.export_checkpoint(schnell.checkpoint, onnx).manifest.origin["precision_choice"] == "by default"
    for _ in range(2):
        again = run_here(["export", str(schnell.checkpoint), "--gpu", "cpu", "--out", str(onnx)], monkeypatch, capfd)
        assert "is up to date, in fp32" in again.out
    assert manifest.read(onnx, "onnx").origin == manifest.read(schnell.onnx, "onnx").origin
    assert ditforge.export_checkpoint(schnell.checkpoint, onnx).manifest.origin["precision_choice"] == "asked for"
    with pytest.raises(UserError, match="memory"):
        build(onnx, tmp_path / "engines", BuildOptions("rtx4090", gpu_memory=0.001))  # of what comes after that check


def test_build_says_the_precision(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    engines = shutil.copytree(schnell.engines, tmp_path / "engines")
    said = run_here(["build", str(schnell.onnx), "--gpu", "cpu", "--out", str(engines)], monkeypatch, capfd).out
    assert said.splitlines()[-1] == "dit is fp32, for cpu"


def test_a_default_is_recorded(random_schnell: Path) -> None:
    from ditforge.export.checkpoint.diffusers_folder import open_checkpoint

    opened, source = open_checkpoint(random_schnell), {"checkpoint": ""}
    for options, recorded in ((ExportOptions(), "by default"), (ExportOptions("fp32"), "asked for")):
        assert onnx_export.origin_of(opened, source, options)["precision_choice"] == recorded
