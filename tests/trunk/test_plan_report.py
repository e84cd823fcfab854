"""`ditforge plan` as a user runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import assert_error, ditforge

from ditforge.engines.gpus import GPUS

MODELS = Path(__file__).parents[2] / "models"
PEAK = r"(\d+\.\d) GB"


def test_a_published_model_on_one_card(tmp_path: Path) -> None:
    result = ditforge("plan", "flux.1-dev", "--random-weights", "--gpu", "rtx3060", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.startswith("flux.1-dev on rtx3060, 12 GB, precision int8-weights\n")
    for side in (512, 768, 1024, 1536, 2048):
        (line,) = re.findall(rf"^{side} x {side} .*$", result.out, re.MULTILINE)
        *peaks, usable = map(float, re.findall(PEAK, line))
        assert len(peaks) == 4 and max(peaks) <= usable == 12.1
        assert "offload" in line
    assert re.search(r"^dit +int8-weights +on-demand +16, 9 in turn +\d", result.out, re.MULTILINE)
    assert re.search(r"^t5 +bf16 +on-demand +8 +1\.\d GB", result.out, re.MULTILINE)
    assert "- 9 of dit's 16 segments are loaded and freed in each step: 8.6 GB a step" in result.out
    assert "━" in result.err  # the progress bar
    assert list(tmp_path.iterdir()) == []


def test_a_row_for_each_gpu(tmp_path: Path) -> None:
    result = ditforge("plan", MODELS / "flux-tiny", "--precision", "fp8-weights", cwd=tmp_path)
    assert result.code == 0, result.err
    heading, *rows = result.out.splitlines()
    assert heading.split() == ["--gpu", "memory", "precision", "128", "512"]
    assert [row.split()[0] for row in rows] == [gpu.name for gpu in GPUS]
    assert sum("resident" in row for row in rows) == sum("fp8-weights" in row and "no fp8" not in row for row in rows)
    assert any("no fp8-weights" in row for row in rows)


def test_without_t5(tmp_path: Path) -> None:
    result = ditforge("plan", MODELS / "sd35-tiny", "--gpu", "rtx3060", "--text-encoders", "clip", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "join_clip" in result.out and "t5" not in result.out


def test_an_export_in_the_precision_that_it_has(schnell, tmp_path: Path) -> None:
    result = ditforge("plan", schnell.onnx, "--gpu", "rtx4090", "--size", "96", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "precision as exported" in result.out
    assert re.search(r"^dit +fp32 +resident +1 +0\.\d GB", result.out, re.MULTILINE)
    assert_error(ditforge("plan", schnell.onnx, "--precision", "bf16", cwd=tmp_path), "exported already")
    assert_error(ditforge("plan", schnell.onnx, "--text-encoders", "clip", cwd=tmp_path), "exported already")
    for gpu in ("rtx4090", "sm_89"):  # of the latter only what is said is known
        result = ditforge("plan", schnell.onnx, "--gpu", gpu, "--gpu-memory", "0.5", "--size", "96", cwd=tmp_path)
        assert f"random-schnell on {gpu}, 0.5 GB, " in result.out
        assert "does not fit" in result.out  # since CUDA takes more


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["nosuch"], "nosuch is not a folder"),
        (["nosuch", "--random-weights"], "flux.1-dev"),
        (["nosuch", "--gpu", "rtx3061"], "did you mean rtx3060"),
        (["nosuch", "--gpu", "sm_89"], "sm_89 is no product"),
        (["nosuch", "--gpu", "cpu"], "the CPU is no GPU"),
        (["nosuch", "--gpu", "cpu", "--gpu-memory", "8"], "--gpu-memory is a GPU's"),
        (["nosuch", "--gpu", "rtx3060", "--gpu-memory", "0"], "got 0"),
        (["nosuch", "--gpu", "rtx3060", "--gpu-memory", "nan"], "got nan"),
        (["nosuch", "--gpu-memory", "8"], "--gpu-memory is that of one GPU"),
        ([str(MODELS / "flux-tiny"), "--gpu", "rtx3060", "--precision", "fp8"], "no FP8 tensor cores"),
        ([str(MODELS / "flux-tiny"), "--gpu", "rtx3060", "--precision", "fp9"], "unknown precision 'fp9'"),
        ([str(MODELS / "flux-tiny"), "--gpu", "rtx3060", "--size", "9999"], "got 9999"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], mention: str, tmp_path: Path) -> None:
    assert_error(ditforge("plan", *arguments, cwd=tmp_path), mention)
