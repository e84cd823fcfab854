"""The verdict of `verify`: what is well, what is damaged, what is different, and what cannot be told here."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import assert_error, ditforge

from ditforge import local_gpu, manifest
from ditforge.commands.verify import row
from ditforge.engines import verdict
from ditforge.engines.verdict import excess, verify
from ditforge.engines.verify import Difference, difference
from ditforge.errors import DitforgeError, UserError
from ditforge.local_gpu import LocalGpu


@pytest.fixture
def engines(schnell, tmp_path: Path) -> Path:
    """A copy of the engines, to be damaged."""
    return shutil.copytree(schnell.engines, tmp_path / "engines")


def with_other_weights(folder: Path) -> None:
    """Change the DiT's weights, and the manifest so that they seem whole."""
    data = folder / "dit.onnx.data"
    weights = np.fromfile(data, np.float32)
    weights[weights.size // 2 :] *= 1.5
    weights.tofile(data)
    describe(folder, "dit", lambda dit: dit["files"].update({data.name: manifest.describe(data).model_dump()}))


def describe(
    folder: Path, component: str, change: Callable[[dict[str, Any]], object], part: str = "components"
) -> None:
    """Change what the manifest says of a component, or of its engine."""
    path = folder / "manifest.json"
    described = json.loads(path.read_text())
    change(described[part][component])
    path.write_text(json.dumps(described))


def test_whole_files(schnell, tmp_path: Path) -> None:
    result = ditforge("verify", schnell.repository, cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out == "verdict: whole: 12 files, all as the manifest says; nothing was executed\n"


def test_damaged_files_are_all_named(engines: Path, tmp_path: Path) -> None:
    (engines / "clip.onnx").unlink()
    with (engines / "dit.onnx").open("ab") as file:
        file.write(b"x")
    result = ditforge("verify", "engines", cwd=tmp_path)
    *problems, fix, last = result.out.splitlines()
    assert (result.code, result.err) == (1, "")
    assert problems[0] == "engines/clip.onnx is missing" and problems[1].startswith("engines/dit.onnx has ")
    assert fix.startswith("fix:   ditforge build ")
    assert last == "verdict: damaged: 2 of 12 files are not as the manifest says"


def test_what_is_compared_with_itself_is_not_shown_as_zero(schnell, tmp_path: Path) -> None:
    """The engines of ONNX Runtime are the reference's graphs, which ONNX Runtime executes as well."""
    result = ditforge("verify", schnell.engines, "--against", schnell.onnx, cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1].startswith("verdict: whole: 12 files, all as the manifest says; ")
    (line,) = result.out.splitlines()[:-1]
    assert line.endswith("the reference's own graphs: clip, t5, dit, vae_decoder, vae_encoder")
    same = verify(schnell.onnx, schnell.onnx)
    assert all(one.same_graph and one.relative == 0 for one in same.differences)
    assert (same.verdict, same.good) == ("whole", True) and "own graphs" in same.reason


def test_the_same_numbers_within_what_the_precision_explains(schnell, dits) -> None:
    found = verify(dits("int8-weights", "bf16"), schnell.onnx)
    (velocity,) = found.differences
    assert (found.verdict, found.good) == ("same", True)
    assert 0 < velocity.relative < verdict.LIMITS["int8-weights"] and not velocity.same_graph
    assert "numbers are the same within" in found.reason


def test_different_numbers(engines: Path, schnell, tmp_path: Path) -> None:
    with_other_weights(engines)
    result = ditforge("verify", "engines", "--against", schnell.onnx, cwd=tmp_path)
    *_, fix, last = result.out.splitlines()
    assert result.code == 1
    assert fix.startswith(
        f"fix:   compare with an fp32 export of the same checkpoint as random-schnell's (now: {schnell.onnx}"
    )
    assert last.startswith("verdict: different: dit's velocity has a relative error of ") and "0.001" in last
    document = json.loads(ditforge("verify", "engines", "--against", schnell.onnx, "--json", cwd=tmp_path).out)
    assert document["verdict"] == "different"
    assert [one["component"] for one in document["differences"]] == ["clip", "t5", "dit", "vae_decoder", "vae_encoder"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_different(value: float) -> None:
    reference = np.ones((2, 3), np.float32)
    broken = difference("dit", "fp8", "velocity", np.full_like(reference, value), reference)
    assert excess(broken) == math.inf
    assert row(broken)[4] == "inf"


def test_outputs_that_are_zero() -> None:
    zero, one = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert difference("dit", "fp32", "velocity", zero, zero).relative == 0
    assert difference("dit", "fp32", "velocity", one, zero).relative == math.inf


def test_what_is_nearest_to_its_limit_decides() -> None:
    def of(precision: str, relative: float) -> Difference:
        return Difference("dit", precision, "velocity", 1, relative, 1, 50)

    assert excess(of("fp32", 0.01)) > 1 > excess(of("fp8", 0.1)) > excess(of("fp8", 0.05)) > excess(of("fp32", 1e-5))
    assert excess(of("a precision of next year", 0.1)) < 1


def test_folders_that_are_swapped(schnell, tmp_path: Path) -> None:
    result = ditforge("verify", schnell.onnx, "--against", schnell.engines, cwd=tmp_path)
    swapped = f"fix:   ditforge verify {schnell.engines} --against {schnell.onnx}\n"
    assert_error(result, f"{schnell.engines} holds engines: the folders are swapped", swapped)


def test_what_is_no_reference(schnell, random_schnell: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes an fp32 export, and .* holds engines"):
        verify(schnell.engines, schnell.engines)
    with pytest.raises(UserError, match=r"has no manifest\.json") as error:
        verify(schnell.engines, random_schnell)
    assert "ditforge export CHECKPOINT --out DIR --precision fp32" in error.value.fix
    with pytest.raises(UserError, match="is not a folder") as error:
        verify(tmp_path / "nowhere", schnell.onnx)
    assert "ditforge build ONNX_DIR" in error.value.fix
    damaged = shutil.copytree(schnell.onnx, tmp_path / "onnx")
    (damaged / "t5.onnx").unlink()
    with pytest.raises(UserError, match="the reference, is damaged") as error:
        verify(schnell.engines, damaged)
    assert error.value.fix.startswith(f"ditforge verify {damaged}")


def test_another_models_export(schnell, sd3, sd3_turbo, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two models that cannot be compared"):
        verify(sd3.engines, schnell.onnx)
    with pytest.raises(UserError, match="two models that cannot be compared"):  # of one family, but other sizes
        verify(sd3.engines, sd3_turbo.onnx)


def test_a_graph_that_cannot_be_executed(schnell, tmp_path: Path) -> None:
    broken = shutil.copytree(schnell.onnx, tmp_path / "onnx")
    (broken / "clip.onnx").write_bytes(b"no graph")
    described = manifest.describe(broken / "clip.onnx").model_dump()
    describe(broken, "clip", lambda clip: clip["files"].update({"clip.onnx": described}))
    with pytest.raises(DitforgeError, match=r"ONNX Runtime cannot execute .*clip\.onnx"):
        verify(broken, schnell.onnx)


def test_engines_for_a_gpu_that_is_not_here(engines: Path, schnell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is none, no option of `verify` could name one."""
    describe(engines, "dit", lambda engine: engine.update(target="sm_89", cache_key={}), part="engines")

    def nothing() -> list[LocalGpu]:
        raise UserError("this machine has no NVIDIA GPU", local_gpu.name_gpu())

    monkeypatch.setattr(local_gpu, "local_gpus", nothing)
    with pytest.raises(UserError, match="they are for sm_89, and this machine has no NVIDIA GPU") as error:
        verify(engines, schnell.onnx)
    assert error.value.fix.startswith(f"ditforge verify ONNX_DIR --against {schnell.onnx} ")
    assert "gpu" not in error.value.fix.partition("   ")[0]
    assert verify(engines).verdict == "whole"  # files can be checked anywhere
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [LocalGpu("NVIDIA H100", "sm_90", 1, 1, "580")])
    with pytest.raises(UserError, match=r"this machine's GPU \(NVIDIA H100\) is sm_90"):
        verify(engines, schnell.onnx)
