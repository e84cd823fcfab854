"""TensorRT, where it is not installed and where there is no GPU: what it says. docs/gpu-checklist.md has the rest."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from ditforge import install_hint
from ditforge.engines import gpus
from ditforge.engines.build import BuildOptions, build
from ditforge.engines.compilers import tensorrt
from ditforge.engines.gpus import Target
from ditforge.errors import UserError

H100 = Target("NVIDIA H100 80GB HBM3", ("sm_90",), 80)


def installed() -> bool:
    try:
        return bool(version("tensorrt"))
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(installed(), reason="TensorRT is installed")
def test_not_installed(schnell, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TensorRT is not installed") as error:
        build(schnell.onnx, tmp_path / "engines", BuildOptions("h100", "tensorrt"))
    assert error.value.fix == f"{install_hint.install('tensorrt')}   (or tensorrt-cu12)"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gpu", "fix"),
    [
        ("rtx4090", 'a machine with sm_89; or compiler="tensorrt-rtx"'),
        ("b200", 'a machine with sm_100; or compiler="onnxruntime"'),
    ],
)
def test_another_machines_gpu(schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, fix: str) -> None:
    monkeypatch.setattr(tensorrt, "version", lambda: "11.4")
    monkeypatch.setattr(gpus, "local_target", lambda: H100)
    with pytest.raises(
        UserError, match=r"compiles on the GPU itself, and this machine's is sm_90 \(NVIDIA H100"
    ) as error:
        build(schnell.onnx, tmp_path / "engines", BuildOptions(gpu, "tensorrt"))
    assert error.value.fix.endswith(fix)


def test_the_key_has_the_gpus_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "local_target", lambda: H100)
    assert tensorrt.settings() == {
        "build_flags": "strongly typed, optimization level 3",
        "gpu": "NVIDIA H100 80GB HBM3",
    }
