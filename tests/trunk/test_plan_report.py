"""`ditforge plan` as a user runs it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Result, assert_error, ditforge, run_here

from ditforge import plan_report
from ditforge.engines.compilers.choice import choose
from ditforge.engines.gpus import GPUS, Target
from ditforge.export.checkpoint.diffusers_folder import CONFIGS
from ditforge.export.checkpoint.random_weights import random_checkpoint
from ditforge.export.families import family_of, find_published

MODELS = Path(__file__).parents[2] / "models"
PEAK = r"(\d+\.\d) GiB"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measurements are kept: shared by these tests, so that each model is measured once."""
    folder = tmp_path_factory.getbasetemp() / "plan-cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


Plan = Callable[..., Result]


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Plan:
    """Runs `ditforge plan ARGUMENTS` in an empty folder, and in this process."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run_here(["plan", *map(str, arguments)], monkeypatch, capfd)


def test_a_published_model_on_one_card(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was measured beforehand, whatever spelling of its name is given; a process of its own says the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = ditforge("plan", "FLUX.1-dev", "--gpu", "rtx3060", cwd=tmp_path)
    assert result.code == 0, result.err
    assert result.out.startswith("flux.1-dev on rtx3060, 12 GiB, engines of tensorrt-rtx, precision int8-weights\n")
    for side in (512, 768, 1024, 1536, 2048):
        (line,) = re.findall(rf"^{side} x {side} .*$", result.out, re.MULTILINE)
        (peak,) = map(float, re.findall(PEAK, line))
        assert peak <= 12.1
        assert "offload" in line
    assert re.search(r"^pictures +strategy +tile +of 11.2 GiB +a step +28 steps", result.out, re.MULTILINE)
    assert re.search(r"^\d+\.\d GiB +1[01]\.\d GiB +\d+\.\d GiB +\d+\.\d GiB", result.out, re.MULTILINE)  # the phases
    assert re.search(r"^dit +int8-weights +on-demand +16, 9 on demand +\d", result.out, re.MULTILINE)
    assert re.search(r"^t5 +bf16 +on-demand +4 +2\.\d GiB", result.out, re.MULTILINE)
    assert "- 9 of dit's 16 segments are copied to the GPU in each step: 8.0 GiB a step" in result.out
    assert result.err == ""
    assert "Times are estimates" in result.out
    again = plan("black-forest-labs/FLUX.1-dev", "--random-weights", "--gpu", "h100", "--json")
    assert (again.code, again.err) == (0, "")
    (h100,) = json.loads(again.out)["gpus"]
    assert h100["compiler"] == choose(Target("h100", ("sm_90",)))[0]
    (usual,) = (fit for fit in h100["sizes"] if fit["size"] == 1024)
    # What was measured on an H100 (benchmarks and data sheets), within what operators are counted differently by.
    assert usual["estimate"]["step_fast"] == pytest.approx(0.1336, rel=0.02)
    assert usual["estimate"]["step_slow"] == pytest.approx(0.1957, rel=0.02)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_measured_once(
    plan: Plan, flux_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, second = (plan(flux_tiny, "--gpu", "rtx3060") for _ in range(2))
    assert (first.code, second.code, second.err) == (0, 0, "")
    assert "20 of 20" in first.err  # the progress
    assert first.out == second.out
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_row_for_each_gpu(plan: Plan) -> None:
    result = plan(MODELS / "flux-tiny", "--precision", "fp8-weights")
    assert result.code == 0, result.err
    title, heading, *rows = result.out.partition("\n\n")[0].splitlines()
    assert "up to 128 x 128" in title
    assert heading.split() == [
        "--gpu",
        "memory",
        "engines",
        "of",
        "precision",
        "takes",
        "strategy",
        "tile",
        "a",
        "step",
    ]
    assert [row.split()[0] for row in rows] == [gpu.name for gpu in GPUS]
    assert sum("resident" in row for row in rows) == sum("fp8-weights" in row for row in rows)
    assert any("lacks it" in row for row in rows)


def test_whose_engines_are_planned(plan: Plan) -> None:
    """Those of the compiler that is named, or of the one that `build` would take."""
    named = plan(MODELS / "flux-tiny", "--gpu", "rtx4090", "--compiler", "inductor")
    assert named.out.startswith("flux-tiny on rtx4090, 24 GiB, engines of inductor, precision fp8-weights\n")
    rows = json.loads(plan(MODELS / "flux-tiny", "--json").out)["gpus"]
    assert {row["gpu"]: row["compiler"] for row in rows} == {
        gpu.name: choose(Target(gpu.name, (gpu.capability,)))[0] for gpu in GPUS
    }


def test_without_t5(plan: Plan) -> None:
    result = plan(MODELS / "sd35-tiny", "--gpu", "rtx3060", "--text-encoders", "clip")
    assert result.code == 0, result.err
    assert "join_clip" in result.out and "t5" not in result.out


def test_an_export_in_the_precision_that_it_has(plan: Plan, schnell) -> None:
    result = plan(schnell.onnx, "--gpu", "rtx4090", "--size", "96")
    assert result.code == 0, result.err
    assert "precision as exported" in result.out
    assert re.search(r"^dit +fp32 +resident +1 +0\.\d GiB", result.out, re.MULTILINE)
    assert_error(plan(schnell.onnx, "--precision", "bf16"), "exported already")
    assert_error(plan(schnell.onnx, "--text-encoders", "clip"), "exported already")


def test_what_does_not_fit_the_gpu_that_is_named(plan: Plan, schnell) -> None:
    for gpu in ("rtx4090", "sm_89"):  # of the latter only what is said is known
        result = plan(schnell.onnx, "--gpu", gpu, "--gpu-memory", "0.5", "--size", "96")
        assert (result.code, result.err) == (1, "")
        assert f"random-schnell on {gpu}, 0.5 GiB, engines of tensorrt-rtx, precision " in result.out
        assert "does not fit" in result.out  # since CUDA takes more


def test_names_of_published_models() -> None:
    for name in ("sd3.5-large-turbo", "SD3.5-Large-Turbo", "stabilityai/stable-diffusion-3.5-large-turbo"):
        assert find_published(name) == CONFIGS / "sd3.5-large-turbo"
    assert (
        find_published("FLUX.1-Schnell")
        == find_published("black-forest-labs/FLUX.1-schnell")
        == CONFIGS / "flux.1-schnell"
    )
    assert find_published("flux.2") is find_published("") is find_published("a/") is None


def test_large_turbo_is_large_in_four_steps() -> None:
    models = []
    for name in ("sd3.5-large-turbo", "SD3.5-large"):
        with random_checkpoint(Path(name)) as opened:
            models.append(family_of(opened).model(opened))
    turbo, large = models
    assert (turbo.name, turbo.default_steps, turbo.default_guidance) == ("sd3.5-large-turbo", 4, 1)
    same = {"name": large.name, "default_steps": large.default_steps, "default_guidance": large.default_guidance}
    assert turbo.model_copy(update=same) == large


def test_the_product_that_the_driver_names() -> None:
    assert plan_report.product_of(Target("NVIDIA H100 80GB HBM3", ("sm_90",), 80)) == "h100"
    assert plan_report.product_of(Target("NVIDIA GeForce RTX 4070 Ti SUPER", ("sm_89",), 16)) == "rtx4070tisuper"
    assert plan_report.product_of(Target("rtx3060", ("sm_86",), 12)) == "rtx3060"


@pytest.mark.parametrize(
    ("arguments", "mention"),
    [
        (["nosuch"], "nosuch is not a folder"),
        (["flux.2"], "flux.1-dev, flux.1-schnell"),
        (["nosuch", "--random-weights"], "flux.1-dev"),
        (["nosuch", "--gpu", "rtx3061"], "did you mean rtx3060"),
        (
            ["nosuch", "--gpu", "sm_89"],
            "fix:   --gpu sm_89 --gpu-memory 12   with the GiB that it has; or a product: --gpu ",
        ),
        (["nosuch", "--gpu", "cpu"], "fix:   leave out --gpu, which plans for all GPUs; or name one: --gpu rtx3060"),
        (["nosuch", "--gpu", "cpu", "--gpu-memory", "8"], "--gpu-memory is a GPU's"),
        (["nosuch", "--gpu", "rtx3060", "--gpu-memory", "0"], "got 0"),
        (["nosuch", "--gpu", "rtx3060", "--gpu-memory", "nan"], "got nan"),
        (["nosuch", "--gpu", "rtx3060", "--gpu-memory", "1e308"], "above 0 and at most 10000 GiB, got 1e+308"),
        (["nosuch", "--gpu-memory", "8"], "--gpu-memory is that of one GPU"),
        ([str(MODELS / "flux-tiny"), "--gpu", "rtx3060", "--precision", "fp8"], "no FP8 tensor cores"),
        ([str(MODELS / "flux-tiny"), "--gpu", "rtx3060", "--precision", "fp9"], "unknown precision 'fp9'"),
        ([str(MODELS / "flux-tiny"), "--gpu", "rtx3060", "--size", "9999"], "got 9999"),
        ([str(MODELS / "flux-tiny" / "README.md")], "README.md is not a checkpoint"),
    ],
)
def test_what_cannot_be_planned(
    arguments: list[str], mention: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    result: Result = run_here(["plan", *arguments], monkeypatch, capfd)
    assert_error(result, mention)
