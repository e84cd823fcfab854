"""`ditforge build` decides by itself: a GPU that is too small for what the real compilers make for it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
from exports import alone

from ditforge import manifest
from ditforge.engines.build import BuildOptions, build
from ditforge.engines.memory import memory_plan
from ditforge.engines.memory.memory_plan import Plan
from ditforge.errors import UserError
from ditforge.triton_repo.repository import write_repository

SIDE = 64
ONE = {"batch": 1, "static": f"{SIDE}x{SIDE}"}


@pytest.fixture
def small(schnell, monkeypatch: pytest.MonkeyPatch) -> int:
    """A card that has, for engines, so many bytes: they hold half of the DiT, and not the whole."""
    found = manifest.read(schnell.onnx, "onnx").components["dit"].footprint
    assert found is not None
    taken = memory_plan.SPARE * found.activations_at(SIDE)
    usable = math.ceil(found.segment(2) + taken)
    assert usable < found.weights + taken, "nothing would have to be cut"
    monkeypatch.setattr(memory_plan, "CONTEXT", 0)
    monkeypatch.setattr(memory_plan, "USABLE", usable / (12 * memory_plan.GIB))
    return usable


def test_a_dit_that_does_not_fit_is_cut(schnell, small: int, tmp_path: Path) -> None:
    seen: list[Plan] = []
    out = tmp_path / "engines"
    built = build(schnell.onnx, out, BuildOptions("rtx3060", **ONE), planned=seen.append)
    (made,) = seen
    assert made.fits and made.peak <= small
    engines = built.manifest.engines
    assert len(engines["dit"].segment_files) == made.placements["dit"].segments > 1
    assert engines["dit"].placement.on_demand == len(engines["dit"].segment_files)
    again = build(schnell.onnx, out, BuildOptions("rtx3060", **ONE))
    assert again.rebuilt == {}


def test_only_what_does_not_fit_is_loaded_on_demand(tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    onnx, out = alone(tiny.onnx, tmp_path / "onnx"), tmp_path / "engines"
    found = manifest.read(onnx, "onnx").components["dit"].footprint
    assert found is not None
    wanted = found.first(1, 4) + found.segment(4) + memory_plan.SPARE * found.activations_at(SIDE)
    monkeypatch.setattr(memory_plan, "CONTEXT", 0)
    some = (wanted + 1) / memory_plan.USABLE / memory_plan.GIB  # for one segment of four that stays, and one that comes
    engine = build(onnx, out, BuildOptions("sm_86", gpu_memory=some, **ONE)).manifest.engines["dit"]
    assert (len(engine.segment_files), engine.placement.on_demand, engine.placement.slots) == (4, 4, 2)
    assert engine.cache_key["segments that can stream"] == "4"
    assert build(onnx, out, BuildOptions("sm_86", gpu_memory=some, **ONE)).rebuilt == {}
    with pytest.raises(UserError, match="does not fit sm_86"):
        build(onnx, out, BuildOptions("sm_86", gpu_memory=some / 4, **ONE))
    with pytest.raises(UserError, match="gpu_memory is for a plan"):
        build(onnx, out, BuildOptions("sm_86", segments=2, gpu_memory=some))


def test_a_text_encoder_that_does_not_fit_is_compiled_for_the_cpu(schnell, tmp_path: Path) -> None:
    onnx, out = tmp_path / "onnx", tmp_path / "engines"
    shutil.copytree(schnell.onnx, onnx)
    found = manifest.read(onnx, "onnx")
    large = found.components["t5"].footprint
    assert large is not None
    one_block = large.model_copy(update={"weights": 10**11, "largest_block": 10**11})  # which no cut makes smaller
    heavy = found.components["t5"].model_copy(update={"footprint": one_block})
    manifest.write(found.model_copy(update={"components": {**found.components, "t5": heavy}}), onnx)
    engines = build(onnx, out, BuildOptions("rtx3060", **ONE)).manifest.engines
    made = {name: (engine.compiler, engine.target) for name, engine in engines.items()}
    assert made.pop("t5") == ("onnxruntime", "cpu")
    assert set(made.values()) == {("tensorrt-rtx", "sm_86")}
    write_repository(out, tmp_path / "repo")
    assert "KIND_CPU" in (tmp_path / "repo" / "t5" / "config.pbtxt").read_text()
    assert "KIND_CPU" in (tmp_path / "repo" / "dit" / "config.pbtxt").read_text()


def test_less_memory_to_compile_in_is_no_reason_to_compile_again(
    schnell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "engines"
    build(schnell.onnx, out, BuildOptions("rtx3060", **ONE))
    monkeypatch.setattr(memory_plan, "BUILD_SPARE", 0)
    found = manifest.read(schnell.onnx, "onnx").components["dit"].footprint
    assert found is not None
    monkeypatch.setattr("ditforge.engines.build.memory_to_compile", lambda: memory_plan.build_peak(found.segment(2)))
    assert build(schnell.onnx, out, BuildOptions("rtx3060", **ONE)).rebuilt == {}
    fresh = build(schnell.onnx, tmp_path / "others", BuildOptions("rtx3060", **ONE)).manifest.engines["dit"]
    assert (len(fresh.segment_files), fresh.placement.on_demand) == (2, 0)


def test_what_does_not_fit_writes_nothing(schnell, small: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory_plan, "USABLE", memory_plan.USABLE / 100)
    with pytest.raises(UserError, match="does not fit rtx3060"):
        build(schnell.onnx, tmp_path / "engines", BuildOptions("rtx3060", **ONE))
    assert list(tmp_path.iterdir()) == []
