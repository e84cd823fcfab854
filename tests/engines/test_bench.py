"""How long engines take: what is timed, on what, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import assert_error, ditforge

from ditforge import manifest
from ditforge.contract import TOKENIZER
from ditforge.engines import bench as module, step_limit
from ditforge.engines.bench import Timing, bench, inputs_of, parse_size, picture_time, step_of
from ditforge.engines.compilers import Arrays
from ditforge.engines.runtime import loading
from ditforge.engines.step_limit import Rates
from ditforge.errors import UserError


def test_every_network_is_timed(schnell, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[Arrays]] = {}
    load = loading.load_engine

    def watched(folder: Path, files, made):
        engine, name = load(folder, files, made), next(iter(files)).partition(".")[0]
        run = engine.run
        engine.run = lambda given: calls.setdefault(name, []).append(given) or run(given)
        return engine

    monkeypatch.setattr(module, "load_engine", watched)
    found = bench(schnell.engines, "64x32", batch=2, runs=3)
    networks = [name for name in manifest.read(schnell.engines, "engines").components if name != TOKENIZER]
    assert [timing.component for timing in found.timings] == networks
    assert {name: len(given) for name, given in calls.items()} == dict.fromkeys(networks, 3 + module.WARM)
    assert calls["dit"][0]["latents"].shape == (2, 16, 4, 8)
    assert (found.device, found.width, found.height, found.runs) == ("cpu", 64, 32, 3)
    for timing in found.timings:
        assert 0 < timing.least_ms <= timing.ms <= timing.most_ms
        assert timing.load_s > 0 and timing.gpu_memory is None


def test_with_guidance_the_dit_takes_two_samples_a_picture(sd3, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    real = inputs_of

    def noted(name: str, component, model, size, batch: int) -> Arrays:
        seen[name] = batch
        return real(name, component, model, size, batch)

    monkeypatch.setattr(module, "inputs_of", noted)
    bench(sd3.engines, "32x32", runs=1)
    assert seen["dit"] == 2 and seen["vae_decoder"] == 1


def test_a_picture_is_all_its_calls(schnell) -> None:
    model = manifest.read(schnell.engines, "engines").model
    timings = [replace(timing, ms=1000.0) for timing in bench(schnell.engines, "16x16", runs=1).timings]
    others = len(timings) - 2  # the DiT is called in each step, the encoder of pictures not at all
    assert picture_time(timings, model) == pytest.approx(model.default_steps + others)
    assert picture_time([timing for timing in timings if timing.component != "dit"], model) is None


def test_the_command_prints_a_row_for_each_network(schnell, tmp_path: Path) -> None:
    result = ditforge("bench", schnell.engines, "--size", "16x32", "--runs", "2", cwd=tmp_path)
    assert result.code == 0, result.err
    first, headings, *rows, last, of_step, step, unknown = result.out.splitlines()
    assert first == "random-schnell on cpu, 16 x 32 pixels, pictures at a time: 1, median of 2 calls"
    assert headings.split()[:4] == ["network", "precision", "compiler", "ms"]
    assert [row.split()[:3] for row in rows][2] == ["dit", "fp32", "onnxruntime"]
    assert last.startswith("a picture of 4 steps: ")
    assert of_step.startswith("a step on") and step.split()[:3] == ["cpu", "onnxruntime", "fp32"]
    assert unknown == "no limit: limits are measured of GPUs"
    document = json.loads(ditforge("bench", schnell.engines, "--runs", "1", "--json", cwd=tmp_path).out)
    assert len(document["timings"]) == len(rows)
    dit = next(timing for timing in document["timings"] if timing["component"] == "dit")
    assert document["step"]["ms"] == dit["ms"] == pytest.approx(1e3 / document["step"]["steps_a_second"])


def test_the_limit_of_a_step(schnell, monkeypatch: pytest.MonkeyPatch) -> None:
    """All operations of a sample at a trillion a second; without a rate for the precision, the reason is told."""
    found = manifest.read(schnell.engines, "engines")
    on_gpu = found.engines | {"dit": found.engines["dit"].model_copy(update={"target": "sm_90"})}
    found = found.model_copy(update={"engines": on_gpu})
    monkeypatch.setattr(step_limit, "measure_rates", lambda compiler: Rates(1e12, 1e12))
    timing = Timing("dit", "bf16", "onnxruntime", 50.0, 49.0, 51.0, 1.0, 2**30)
    step = step_of(timing, found, (64, 64), 3)
    footprint = found.components["dit"].footprint
    assert footprint is not None
    assert step.limit_ms == pytest.approx(1e3 * 3 * (footprint.flops_at(64) or 0) / 1e12)
    assert step.of_limit == pytest.approx(50.0 / step.limit_ms) and step.unknown == ""
    assert step.gpu_memory == 2**30
    step = step_of(replace(timing, precision="nvfp4"), found, (64, 64), 3)
    assert step.limit_ms is None and step.unknown == "no rate of products in nvfp4 can be measured here"


@pytest.mark.parametrize(
    ("arguments", "problem", "fix"),
    [
        (["--size", "a"], "--size a is not a size", "--size"),
        (["--size", "17x16"], "pixels in steps of 16, not 17", "--size"),
        (["--size", "16x160000"], "pixels in steps of 16, not 160000", "--size"),
        (["--batch", "0"], "pictures at a time, not 0", "--batch 1"),
        (["--runs", "0"], "--runs must be from 1 to 10000, got 0", "--runs 10"),
    ],
)
def test_what_cannot_be_timed(schnell, tmp_path: Path, arguments: list[str], problem: str, fix: str) -> None:
    assert_error(ditforge("bench", schnell.engines, *arguments, cwd=tmp_path), problem, fix)


def test_a_folder_without_engines(schnell, tmp_path: Path) -> None:
    assert_error(ditforge("bench", schnell.onnx, cwd=tmp_path), "is a folder of ONNX graphs", "ditforge build")


def test_static_sizes(schnell) -> None:
    model = manifest.read(schnell.engines, "engines").model.model_copy(update={"sizes": ((32, 64), (16, 16))})
    assert parse_size(None, model) == (64, 32)
    assert parse_size("64x32", model) == (64, 32)
    with pytest.raises(UserError, match="the engines take 64x32, 16x16, not 32x64") as error:
        parse_size("32x64", model)
    assert error.value.fix == 'size="64x32"'
