"""Engines of Inductor, compiled for the CPU: their numbers, what is streamed, and what is refused."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from exports import alone
from hypothesis import given, strategies as st

from ditforge import manifest
from ditforge.engines.build import BuildOptions, build
from ditforge.engines.compilers import Arrays, inductor_engine
from ditforge.engines.compilers.inductor_engine import Variant
from ditforge.engines.runtime import inductor
from ditforge.engines.runtime.inductor import Execution, load_engine, load_package, spread
from ditforge.engines.runtime.loading import load_engine as load_placed
from ditforge.engines.verify import example
from ditforge.errors import DitforgeError, UserError
from ditforge.placement import Placement

OPTIONS = BuildOptions(gpu="cpu", compiler="inductor", static="64x48", batch=1)
SIZES = {"batch": 1, "latent_height": 6, "latent_width": 8}


@pytest.fixture(scope="session")
def built(schnell, shared: Callable[..., Path]) -> Path:
    """The random checkpoint's DiT as an engine for one size."""

    def make(out: Path) -> None:
        build(alone(schnell.onnx, out / "onnx"), out / "engines", OPTIONS)

    return shared("inductor", make)


@pytest.fixture
def engines(built: Path) -> Path:
    return built / "engines"


@pytest.fixture
def inputs(built: Path) -> Arrays:
    found = manifest.read(built / "onnx", "onnx")
    return {name: example(name, tensor, SIZES, found.model) for name, tensor in found.components["dit"].inputs.items()}


@pytest.fixture
def expected(built: Path, inputs: Arrays) -> Arrays:
    session = ort.InferenceSession(built / "onnx" / "dit.onnx", providers=["CPUExecutionProvider"])
    return {"velocity": session.run(["velocity"], inputs)[0]}


def load(folder: Path, budget: int | None = None) -> Execution:
    found = manifest.read(folder, "engines")
    files = [folder / name for name in found.components["dit"].files]
    version = found.engines["dit"].compiler_version
    return load_engine(files, "cpu", version, version, budget)


def test_equal_blocks_share_a_package(engines: Path, built: Path) -> None:
    files = manifest.read(engines, "engines").components["dit"].files
    packages = [name for name in files if name.endswith(inductor_engine.PACKAGE)]
    description = inductor_engine.read(engines / "dit.inductor")
    kinds = [call.kind for call in description.calls]
    assert len(packages) == len({*kinds}) < len(kinds)
    weights = (engines / "dit.safetensors").stat().st_size
    stored = (built / "onnx" / "dit.onnx.data").stat().st_size
    assert weights == pytest.approx(stored, rel=0.05)


def test_it_computes_what_the_graph_computes(engines: Path, inputs: Arrays, expected: Arrays) -> None:
    """Float32 is summed in another order."""
    engine = load(engines)
    assert (engine.inputs, engine.outputs) == ([*inputs], ["velocity"])
    for _ in range(2):
        np.testing.assert_allclose(engine.run(inputs)["velocity"], expected["velocity"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("share", [0, 0.5], ids=["all", "some"])
def test_weights_that_do_not_stay_are_streamed(engines: Path, inputs: Arrays, expected: Arrays, share: float) -> None:
    weights = (engines / "dit.safetensors").stat().st_size
    engine = load(engines, int(share * weights))
    streamed = [block for block in engine.blocks if block.host is not None]
    assert streamed and (len(streamed) == sum(block.size > 0 for block in engine.blocks)) == (share == 0)
    kept = sum(block.size for block in engine.blocks if block.host is None)
    assert kept <= share * weights
    for _ in range(2):
        np.testing.assert_allclose(engine.run(inputs)["velocity"], expected["velocity"], rtol=0, atol=1e-4)


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(0, 2000))
def test_blocks_that_stay_are_spread(sizes: list[int], budget: int) -> None:
    """They take the budget as far as blocks fit in, and no part of the calls has many more of them than another."""
    stays = spread(sizes, budget)
    kept = sum(size for size, stay in zip(sizes, stays, strict=True) if stay)
    assert kept <= budget
    assert all(kept + size > budget for size, stay in zip(sizes, stays, strict=True) if not stay)
    share, ahead, passed = min(1.0, budget / max(sum(sizes), 1)), 0.0, 0
    for size, stay in zip(sizes, stays, strict=True):
        passed += size
        ahead += size * stay
        assert abs(ahead - share * passed) <= 2 * max(sizes, default=0)


def test_copies_of_a_spread_engine_are_hidden() -> None:
    """FLUX.1-dev's blocks in FP8, of which a third do not stay: a step takes hardly longer than its computation.

    A block is copied as soon as one of two slots is free. Copying takes 20 ms a GB, and computing 7.
    """

    def step(stays: list[bool]) -> float:
        computed, copied, slots = 0.0, 0.0, [0.0, 0.0]
        for size, stay in zip(sizes, stays, strict=True):
            if not stay:
                copied = max(copied, slots[0]) + 20e-9 * size
            computed = (computed if stay else max(computed, copied)) + 7e-9 * size
            if not stay:
                slots = [slots[1], computed]
        return computed

    sizes = [340_000_000] * 19 + [141_000_000] * 38
    budget = sum(sizes) * 2 // 3
    together = [sum(sizes[: number + 1]) <= budget for number in range(len(sizes))]
    assert step(spread(sizes, budget)) < 1.1 * step([True] * len(sizes)) < 0.9 * step(together)


def test_the_plans_budget_reaches_the_engine(engines: Path, inputs: Arrays, expected: Arrays) -> None:
    found = manifest.read(engines, "engines")
    made = found.engines["dit"].model_copy(update={"placement": Placement(weight_budget=0)})
    engine = load_placed(engines, found.components["dit"].files, made)
    assert isinstance(engine, Execution) and all(block.host is not None for block in engine.blocks if block.size)
    np.testing.assert_allclose(engine.run(inputs)["velocity"], expected["velocity"], rtol=0, atol=1e-4)
    engine.close()


class Recorder:
    """Stands in for a GPU that records graphs: a graph is what it was recorded of."""

    def __init__(self) -> None:
        self.computing, self.replay, self.tries, self.full = self, lambda: None, 0, False

    def synchronize(self) -> None:
        """Everything has been computed."""

    def record(self, calls: Callable[[], dict[str, torch.Tensor]]) -> tuple[Recorder, dict[str, torch.Tensor]]:
        self.tries += 1
        if self.full:
            raise torch.OutOfMemoryError("CUDA out of memory in block")
        return self, calls()


def steps(
    engines: Path, inputs: Arrays, recorder: Recorder, monkeypatch: pytest.MonkeyPatch, failing: set[int]
) -> Iterator[Arrays | str]:
    """What step after step of a resident engine gives, of which some run out of memory before they are recorded."""
    monkeypatch.setattr(inductor, "LAUNCHING", 1e-9)  # as if hardly anything took time but starting kernels
    engine = load(engines)
    given = {name: torch.from_numpy(inputs[name]) for name in engine.inputs}
    key = tuple(tuple(tensor.shape) for tensor in given.values())
    variant = engine.variant(dict(zip(engine.inputs, key, strict=True)))
    run_calls = engine.run_calls
    for number in range(7):

        def calls(variant: Variant, given: dict[str, torch.Tensor], fails: bool = number in failing):
            if fails:
                raise torch.OutOfMemoryError("CUDA out of memory in block")
            return run_calls(variant, given)

        monkeypatch.setattr(engine, "run_calls", calls)
        try:
            yield {"velocity": engine.replayed(recorder, variant, given, key)["velocity"].numpy()}
        except torch.OutOfMemoryError as error:
            yield str(error)


@pytest.mark.parametrize("failing", [set(), {0}, {1}, {0, 1}, {1, 2, 3}])
def test_a_step_that_ran_out_of_memory_is_no_reason_for_later_ones_to_fail(
    engines: Path, inputs: Arrays, expected: Arrays, monkeypatch: pytest.MonkeyPatch, failing: set[int]
) -> None:
    recorder = Recorder()
    for number, made in enumerate(steps(engines, inputs, recorder, monkeypatch, failing)):
        if number in failing:
            assert made == "CUDA out of memory in block"
        else:
            assert not isinstance(made, str)
            np.testing.assert_allclose(made["velocity"], expected["velocity"], rtol=1e-3, atol=1e-4)
    assert recorder.tries == 1


def test_without_room_for_a_graph_steps_do_without(
    engines: Path, inputs: Arrays, expected: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    recorder.full = True
    for made in steps(engines, inputs, recorder, monkeypatch, set()):
        assert not isinstance(made, str)
        np.testing.assert_allclose(made["velocity"], expected["velocity"], rtol=1e-3, atol=1e-4)
    assert recorder.tries == 1


def test_another_size_is_refused(engines: Path, inputs: Arrays) -> None:
    wide = {**inputs, "latents": np.zeros((1, 16, 8, 8), np.float32)}
    with pytest.raises(UserError, match=r"the engine was built for .*'latents': '\(1, 16, 6, 8\) to") as error:
        load(engines).run(wide)
    assert "--resolutions MIN-MAX" in error.value.fix


def test_an_engine_of_another_pytorch_is_refused(engines: Path) -> None:
    files = [engines / name for name in manifest.read(engines, "engines").components["dit"].files]
    with pytest.raises(UserError, match=r"was compiled by PyTorch 2\.0\.0, and 2\.1\.0 is installed") as error:
        load_engine(files, "cpu", "2.0.0", "2.1.0")
    assert "ditforge build ONNX_DIR --gpu cpu --compiler inductor --out DIR" in error.value.fix


def test_an_engine_for_a_gpu_is_refused_without_one(engines: Path) -> None:
    files = [engines / name for name in manifest.read(engines, "engines").components["dit"].files]
    with pytest.raises(UserError, match="they are for sm_90, and this machine has no NVIDIA GPU"):
        load_engine(files, "sm_90", "2.1.0", "2.1.0")


def test_a_package_whose_code_has_changed_is_not_loaded(engines: Path, tmp_path: Path) -> None:
    """It would end the process, as soon as it is loaded or later."""
    package = shutil.copy(next(engines.glob("dit-*.pt2")), tmp_path / "package.pt2")
    load_package(package, torch.device("cpu"))
    with zipfile.ZipFile(package) as archive:
        code = next(one for one in archive.infolist() if one.filename.endswith(".so"))
    with package.open("r+b") as file:
        file.seek(code.header_offset + code.file_size // 2)
        file.write(bytes(64))
    with pytest.raises(DitforgeError, match=r"package\.pt2 is damaged: .*\.so in it has changed"):
        load_package(package, torch.device("cpu"))


def test_files_that_are_missing_or_damaged(engines: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"an engine of inductor has files .inductor and .safetensors, and not only"):
        load_engine([engines / "dit.safetensors"], "cpu", "2", "2")
    copy = shutil.copytree(engines, tmp_path / "engines")
    (copy / "dit.inductor").write_text('{"calls": 3}')
    with pytest.raises(UserError, match=r"dit.inductor is damaged: .*") as error:
        load(copy)
    assert "ditforge build" in error.value.fix


def test_the_same_build_again_compiles_nothing(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    assert build(copy / "onnx", copy / "engines", OPTIONS).rebuilt == {}


def test_blocks_need_no_segments(built: Path, tmp_path: Path) -> None:
    options = BuildOptions(gpu="cpu", compiler="inductor", static="64x48", segments=3)
    with pytest.raises(UserError, match="inductor compiles blocks, whose weights it streams, and so needs no segments"):
        build(built / "onnx", tmp_path / "engines", options)


def test_an_export_without_programs(built: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(built / "onnx", tmp_path / "onnx")
    found = manifest.read(copy, "onnx")
    dit = found.components["dit"]
    without = {name: file for name, file in dit.files.items() if not name.endswith(".programs")}
    components = {**found.components, "dit": dit.model_copy(update={"files": without})}
    manifest.write(found.model_copy(update={"components": components}), copy)
    with pytest.raises(UserError, match="the export has no programs of dit, which inductor compiles") as error:
        build(copy, tmp_path / "engines", OPTIONS)
    assert error.value.fix == "ditforge export CHECKPOINT --out DIR   again"
