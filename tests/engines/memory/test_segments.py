"""A graph in segments computes what the whole does; what is passed on; builds, and their processes, on demand."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import weakref
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from command_line import PATIENCE, eventually, popen
from exports import alone, export_dits
from onnx import TensorProto, helper

from ditforge import manifest
from ditforge.client import Client
from ditforge.contents import look_into
from ditforge.engines import build as building
from ditforge.engines.build import BuildOptions, build, cut_graph, ranges
from ditforge.engines.compilers import NUMPY_DTYPES, Arrays, Job, LoadedEngine, onnxruntime as ort_compiler
from ditforge.engines.memory.segments import Segment, cut
from ditforge.engines.profile import Profile, make_profiles
from ditforge.engines.runtime import loading
from ditforge.engines.runtime.loading import Chain, OnDemand, load_engine
from ditforge.engines.verify import compare, verify_files
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.quantisation.calibration import calibrate
from ditforge.machine_memory import Memory
from ditforge.manifest import Component, Engine, Tensor
from ditforge.placement import Placement
from ditforge.triton_repo.repository import write_repository
from ditforge.triton_repo.server import start

SIZES = [{"batch": 1, "latent_height": 12, "latent_width": 12}, {"batch": 3, "latent_height": 20, "latent_width": 6}]


def example(component: Component, sizes: dict[str, int], seed: int = 0) -> Arrays:
    """Random inputs."""
    random = np.random.default_rng(seed)
    shapes = {name: [sizes[d] if isinstance(d, str) else d for d in t.shape] for name, t in component.inputs.items()}
    return {
        name: random.random(shape).astype(NUMPY_DTYPES[component.inputs[name].dtype]) for name, shape in shapes.items()
    }


def load(engines: Path, on_demand: int | None = None, slots: int = 1) -> LoadedEngine:
    """The DiT of a build; with so many of its segments on demand, or as many as are meant to be."""
    built = manifest.read(engines, "engines")
    dit, engine = built.components["dit"], built.engines["dit"]
    some = engine.placement.on_demand if on_demand is None else on_demand
    placement = engine.placement.model_copy(update={"on_demand": some, "slots": slots})
    return load_engine(engines, dit.files, engine.model_copy(update={"placement": placement}))


def segments_of(export: Path, count: int) -> list[Segment]:
    """The DiT of an export in `count` segments, for the default sizes."""
    found = manifest.read(export, "onnx")
    profiles = make_profiles(found.model, None, None, None)
    return cut_graph(export / "dit.onnx", found.components["dit"], found.model, profiles, count)


def most_segments(export: Path) -> int:
    with pytest.raises(UserError, match="can be cut into 1 to") as error:
        segments_of(export, 1000)
    return int(error.value.fix.removeprefix("segments="))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    """But for rounding: a graph in segments is fused otherwise, and batches and CPUs have sums in other orders.

    Seen were 5e-7 of the largest velocity, in 29 segments; numbers of 16 bits between them would cost 1e-4 and more.
    """
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.fixture(params=["schnell", "tiny", "sd3"])
def stages(request: pytest.FixtureRequest):
    """Checkpoints through every stage, fp32."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def dit(tiny, tmp_path: Path) -> Path:
    """flux-tiny's DiT, fp32."""
    return alone(tiny.onnx, tmp_path / "onnx")


def test_segments_compute_what_the_whole_does(stages, tmp_path: Path) -> None:
    onnx_dir = alone(stages.onnx, tmp_path / "onnx")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in onnx_dir.rglob("*") if path.is_file()}
    component = manifest.read(stages.onnx, "onnx").components["dit"]
    whole = load(stages.engines)
    most = most_segments(onnx_dir)
    for count, residency in ((2, "resident"), (3, "on-demand"), (most, "resident")):
        built = build(onnx_dir, tmp_path / "engines", BuildOptions("cpu", segments=count, residency=residency)).manifest
        engine = built.engines["dit"]
        assert (len(engine.segment_files), engine.placement.on_demand) == (
            count,
            count if residency == "on-demand" else 0,
        )
        assert {file for part in engine.segment_files for file in part} == set(built.components["dit"].files)
        chain = load(tmp_path / "engines")
        for sizes in SIZES:
            inputs = example(component, sizes)
            expected = whole.run(inputs)["velocity"]
            (velocity,) = chain.run(inputs).values()
            assert_close(velocity, expected)
            requests = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(sizes["batch"])]
            assert_close(chain.run_batch(requests)["velocity"], expected)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in onnx_dir.rglob("*") if path.is_file()} == (
        before
    )


def test_every_shape_is_inferred(stages, tmp_path: Path) -> None:
    """Of what is passed on between as many segments as there can be, against what ONNX Runtime computes."""
    found = manifest.read(stages.onnx, "onnx")
    component, step = found.components["dit"], found.model.size_multiple
    profile = Profile((step, 3 * step), (2 * step, 2 * step), (5 * step, 3 * step), max_batch=3)
    segments = cut_graph(stages.onnx / "dit.onnx", component, found.model, [profile], most_segments(stages.onnx))
    graph = onnx.load(stages.onnx / "dit.onnx")
    passed = {name for segment in segments for name in segment.component.outputs} - set(component.outputs)
    graph.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in passed)
    session = ort.InferenceSession(graph.SerializeToString())
    (of_inputs,) = ranges(component, [profile], found.model)
    for i in range(3):
        inputs = {n: np.zeros(of_inputs[n][i], NUMPY_DTYPES[t.dtype]) for n, t in component.inputs.items()}
        made = dict(zip(passed, session.run(list(passed), inputs), strict=True))
        for segment in segments:
            (shapes,) = segment.shapes
            assert {name: shapes[name][i] for name in shapes if name in passed} == {
                name: made[name].shape for name in segment.component.inputs if name in passed
            }


@pytest.fixture(scope="module")
def deep(flux_tiny: Path, shared) -> Path:
    """flux-tiny's DiT, of so many blocks that cuts are between them, in the formats that change its graph."""

    def make(out: Path) -> None:
        calibrate(CheckpointSource(flux_tiny), out / "ranges.json", ["a red circle", "two blue squares"])
        export_dits(flux_tiny, out / "ranges.json", "fp32", out, ["fp8-weights", "fp8"])

    return shared("deep", make)


@pytest.mark.parametrize("precision", ["fp32", "fp8-weights", "fp8"])
def test_only_hidden_states_and_conditioning_are_passed_on(deep: Path, flux_tiny: Path, precision: str) -> None:
    folder = deep / precision
    inputs = manifest.read(folder, "onnx").components["dit"].inputs
    config = json.loads((flux_tiny / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    for count in (2, 3):
        segments = segments_of(folder, count)
        weights = [segment.weights for segment in segments]
        assert max(weights) < 1.3 * sum(weights) / count
        for first, second in pairwise(segments):
            passed = {n: t for n, t in second.component.inputs.items() if n not in inputs}
            assert len(passed) <= 3  # pictures' and prompts' hidden states, or both as one; and the conditioning vector
            assert {t.dtype for t in passed.values()} == {"FP32"}
            assert {t.shape[-1] for t in passed.values()} == {width}
            assert {t.shape[0] for t in passed.values()} == {"batch"}
            assert set(first.component.outputs) <= set(passed)
            assert set(second.component.inputs) - set(passed) <= {"latents"}  # for positions, made of its size


def deep_graph(blocks: int, width: int = 16) -> onnx.ModelProto:
    """A transformer without attention: hidden states `hidden.i` behind block i, each modulated by one vector."""
    nodes, weights = [], [helper.make_tensor("ones", TensorProto.FLOAT, [width], [1.0] * width)]

    def add(kind: str, inputs: list[str], *outputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, outputs, **attributes))
        return outputs[0]

    def linear(value: str, name: str, out: int, rows: int = width) -> str:
        random = np.random.default_rng(len(weights)).standard_normal((rows, out)).astype(np.float32)
        weights.append(onnx.numpy_helper.from_array(random / rows, f"{name}.weight"))
        return add("MatMul", [value, f"{name}.weight"], name)

    hidden, vector = linear("x", "hidden.0", width), linear("c", "vector", width)
    for i in range(1, blocks + 1):
        both = add(
            "Split", [linear(vector, f"{i}.modulation", 2 * width)], f"{i}.scale", f"{i}.gate", axis=-1, num_outputs=2
        )
        normed = add("LayerNormalization", [hidden, "ones"], f"{i}.normed")
        wide = add("Gelu", [linear(add("Mul", [normed, both], f"{i}.in"), f"{i}.up", 4 * width)], f"{i}.wide")
        made = add("Mul", [linear(wide, f"{i}.down", width, rows=4 * width), f"{i}.gate"], f"{i}.out")
        hidden = add("Add", [hidden, made], f"hidden.{i}")
    linear(hidden, "y", width)
    nodes[-1].output[0] = "y"
    ports = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *more, width])
        for name, more in {"x": ["tokens"], "c": [1], "y": ["tokens"]}.items()
    }
    graph = helper.make_graph(nodes, "deep", [ports["x"], ports["c"]], [ports["y"]], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_many_blocks_are_cut_between_and_evenly(tmp_path: Path) -> None:
    onnx.save(deep_graph(30), tmp_path / "dit.onnx")
    x, c = (Tensor(dtype="FP32", shape=("batch", *more, 16)) for more in (("tokens",), (1,)))
    component = Component(files={}, precision="fp32", reason="", inputs={"x": x, "c": c}, outputs={"y": x})
    probe = {"x": ((1, 8, 16), (1, 12, 16), (2, 20, 16)), "c": ((1, 1, 16), (1, 1, 16), (2, 1, 16))}
    for count in (2, 3, 4, 7, 10, 15, 30):
        segments = cut(tmp_path / "dit.onnx", component, count, probe, [probe])
        weights = [segment.weights for segment in segments]
        assert max(weights) < 1.3 * sum(weights) / count
        for segment in segments[1:]:
            (hidden,) = (name for name in segment.component.inputs if name != "vector")
            assert hidden.startswith("hidden.")
            assert segment.component.inputs[hidden] == x
            assert segment.shapes[0][hidden] == probe["x"]


def test_cutting_reads_no_weights(tiny, tmp_path: Path) -> None:
    shutil.copyfile(tiny.onnx / "dit.onnx", tmp_path / "dit.onnx")
    shutil.copyfile(tiny.onnx / "manifest.json", tmp_path / "manifest.json")
    total = manifest.read(tiny.onnx, "onnx").components["dit"].files["dit.onnx.data"].size
    for i, segment in enumerate(segments_of(tmp_path, 4)):
        file = segment.save(tmp_path / f"{i}.onnx")
        assert file.stat().st_size < total / 100
    assert sum(segment.weights for segment in segments_of(tmp_path, 4)) == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("count", [0, -1, 19])
def test_more_segments_than_there_are(dit: Path, tmp_path: Path, count: int) -> None:
    with pytest.raises(UserError, match=f"can be cut into 1 to 18 segments, not {count}") as error:
        build(dit, tmp_path / "engines", BuildOptions("cpu", segments=count))
    assert error.value.fix in ("segments=1", "segments=18")
    assert not (tmp_path / "engines").exists()


def test_a_graph_without_a_place_to_cut(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [0.0, 1.0, 2.0, 3.0])
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "one", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "dit.onnx")
    tensor = Tensor(dtype="FP32", shape=("batch", 2))
    component = Component(files={}, precision="fp32", reason="", inputs={"x": tensor}, outputs={"y": tensor})
    sizes = {"x": ((1, 2), (1, 2), (2, 2))}
    with pytest.raises(UserError, match="can be cut into 1 to 1 segments, not 2"):
        cut(tmp_path / "dit.onnx", component, 2, sizes, [sizes])


def test_unknown_residency(dit: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown residency 'never'") as error:
        build(dit, tmp_path / "engines", BuildOptions("cpu", residency="never"))
    assert error.value.fix == "residency with one of: resident, on-demand"


# Builds


def test_the_same_segments_are_not_built_again(dit: Path, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    assert build(dit, out, BuildOptions("cpu", segments=2)).rebuilt == {"dit": "there was none before"}
    inode = out.stat().st_ino
    assert build(dit, out, BuildOptions("cpu", segments=2)).rebuilt == {}
    assert out.stat().st_ino == inode
    parts = {path.name: path.stat().st_ino for path in out.glob("dit-*")}
    assert (
        build(dit, out, BuildOptions("cpu", segments=2, residency="on-demand")).rebuilt == {}
    )  # another manifest, the same engines
    assert {path.name: path.stat().st_ino for path in out.glob("dit-*")} == parts
    assert manifest.read(out, "engines").engines["dit"].placement.on_demand == 2
    (described,) = (part for part in look_into(out).parts if part.name == "dit")
    assert (described.segments, described.residency) == (2, "on-demand")
    assert build(dit, out, BuildOptions("cpu", segments=3)).rebuilt == {
        "dit": "segments was 2 (cutting 1), is 3 (cutting 1)"
    }
    assert build(dit, out).rebuilt == {"dit": "segments was 3 (cutting 1), is 1"}
    assert verify_files(out) == 4
    assert {path.name for path in out.iterdir()} == {"dit.onnx", "dit.onnx.data", "tokenizer", "manifest.json"}


@pytest.mark.parametrize("key", [("fp8", "bf16"), pytest.param(("fp8-weights", "bf16"), marks=pytest.mark.matrix)])
def test_tensorrt_compiles_segments(exports, tmp_path: Path, key: tuple[str, str]) -> None:
    """Names, dtypes (bf16 too) and shapes of what is passed on are checked against the network as it is parsed."""
    folder = alone(exports(*key), tmp_path / "onnx")
    seen: list[str] = []
    whole = build(folder, tmp_path / "whole", BuildOptions("sm_89", segments=1)).manifest.components["dit"]
    out = tmp_path / "engines"
    built = build(folder, out, BuildOptions("sm_89", segments=2), progress=lambda doing, *_: seen.append(doing))
    assert {"dit 1 of 2: Building engine", "dit 2 of 2: Building engine"} <= set(seen)
    assert built.manifest.engines["dit"].segment_files == (("dit-1.plan",), ("dit-2.plan",))
    sizes = [file.size for file in built.manifest.components["dit"].files.values()]
    assert sum(sizes) == pytest.approx(sum(file.size for file in whole.files.values()), rel=0.15)
    assert max(sizes) < 0.6 * sum(sizes)
    assert build(folder, out, BuildOptions("sm_89", segments=2, residency="on-demand")).rebuilt == {}
    assert build(folder, out, BuildOptions("sm_89", segments=3)).rebuilt == {
        "dit": "segments was 2 (cutting 1), is 3 (cutting 1)"
    }
    assert {path.name for path in out.iterdir()} == {"dit-1.plan", "dit-2.plan", "dit-3.plan", "tokenizer"} | {
        "manifest.json"
    }


def children(pid: int) -> list[int]:
    """The processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_compilers_process_ends_with_ours(dit: Path, tmp_path: Path, number: int) -> None:
    with popen("build", dit, "--gpu", "sm_89", "--segments", "2", "--out", "engines", cwd=tmp_path) as process:
        eventually(lambda: list(tmp_path.glob(".engines.*/dit-1.plan")))  # which is opened before the compiler starts
        (child,) = children(process.pid)
        process.send_signal(number)
        process.wait(PATIENCE)
        eventually(lambda: not running(child))
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == codes[signal.Signals(number)]
    if number != signal.SIGKILL:
        assert {path.name for path in tmp_path.iterdir()} == {"onnx"}


def test_a_compiler_that_is_killed(dit: Path, tmp_path: Path) -> None:
    """As the system does when memory runs out."""
    with popen("build", dit, "--gpu", "sm_89", "--out", "engines", cwd=tmp_path) as process:
        eventually(lambda: list(tmp_path.glob(".engines.*/dit.plan")))
        os.kill(children(process.pid)[0], signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "error: the compiler was killed by SIGKILL while it compiled dit" in said
    assert "fix:   free some memory; or ditforge build ONNX_DIR --segments N" in said
    assert {path.name for path in tmp_path.iterdir()} == {"onnx"}


# Running


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("resident", [0, 1, 2])
def test_no_more_segments_are_loaded_than_have_room(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: int, slots: int
) -> None:
    """And the others stay. With two slots, each is loaded while the one before it is there."""
    sessions: list[weakref.ref[ort.InferenceSession]] = []
    loaded: list[int] = []
    real = ort_compiler.load

    def noted(*args):
        loaded.append(alive(sessions))
        engine = real(*args)
        sessions.append(weakref.ref(engine.session))
        return engine

    monkeypatch.setattr(ort_compiler, "COMPILER", replace(ort_compiler.COMPILER, load=noted))
    built = build(dit, tmp_path / "engines", BuildOptions("cpu", segments=3, residency="on-demand")).manifest
    chain = load(tmp_path / "engines", 3 - resident, slots)
    at_start = [0, 1, 2][:resident] + [resident] * (3 - resident)
    assert loaded == at_start  # each was tried once
    inputs = example(built.components["dit"], SIZES[0])
    (velocity,) = chain.run(inputs).values()
    most = [resident, *[resident + slots - 1] * 2][: 3 - resident]
    assert len(loaded) == 6 - resident and loaded[:3] == at_start
    assert all(resident <= seen <= there for seen, there in zip(loaded[3:], most, strict=True))
    assert alive(sessions) == resident
    chain.close()
    assert alive(sessions) == 0
    build(dit, tmp_path / "engines", BuildOptions("cpu", segments=3))
    sessions.clear()
    chain = load(tmp_path / "engines")
    assert_close(chain.run(inputs)["velocity"], velocity)
    assert alive(sessions) == 3
    chain.close()
    assert alive(sessions) == 0


@pytest.fixture
def streaming(dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """A compiler whose engines stream, with ONNX Runtime's in their place: the budget of each that was loaded so.

    It compiles the DiT in three segments into the folder `engines`.
    """
    loaded: list[int | None] = []

    def frugally(files: list[Path], target: str, built_with: str, budget: int | None) -> LoadedEngine:
        loaded.append(budget)
        return ort_compiler.load(files, target, built_with)

    monkeypatch.setattr(ort_compiler, "COMPILER", replace(ort_compiler.COMPILER, load_frugally=frugally))
    build(dit, tmp_path / "engines", BuildOptions("cpu", segments=3))
    return loaded


def test_segments_that_stream_are_loaded_once(streaming: list[int | None], tmp_path: Path) -> None:
    whole = load(tmp_path / "engines")
    assert streaming == []
    chain = load(tmp_path / "engines", 2, slots=2)
    assert streaming == [0, 0]
    inputs = example(manifest.read(tmp_path / "engines", "engines").components["dit"], SIZES[0])
    for _ in range(2):
        assert_close(chain.run(inputs)["velocity"], whole.run(inputs)["velocity"])
    assert streaming == [0, 0]
    assert isinstance(chain, Chain) and not any(isinstance(segment, OnDemand) for segment in chain.segments)


def test_segments_with_room_for_one_do_not_stream(streaming: list[int | None], tmp_path: Path) -> None:
    load(tmp_path / "engines", 2, slots=1)
    assert streaming == [None, None]  # frugally, but whole


def test_a_machine_with_too_little_memory_to_stream(
    streaming: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of all segments that do not stay are in it at once."""
    files = manifest.read(tmp_path / "engines", "engines")
    size = sum(
        files.components["dit"].files[name].size for part in files.engines["dit"].segment_files[1:] for name in part
    )
    monkeypatch.setattr(loading, "read_memory", lambda: Memory(10 * size, size))
    load(tmp_path / "engines", 2, slots=2)
    assert streaming == [0, 0]
    monkeypatch.setattr(loading, "read_memory", lambda: Memory(10 * size, size - 1))
    with pytest.warns(DitforgeWarning, match="does not stream, and is loaded from its files in each step: .* are free"):
        load(tmp_path / "engines", 2, slots=2)
    assert streaming == [0, 0, None, None]


def test_engines_that_cannot_stream_are_loaded_on_demand(
    streaming: list[int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a build before there was streaming; what has been loaded to stream is closed."""
    sessions: list[weakref.ref[ort.InferenceSession]] = []

    def frugally(files: list[Path], target: str, built_with: str, budget: int | None) -> LoadedEngine:
        if budget is not None and sessions:
            raise UserError("it was not compiled to stream its weights", "")
        engine = ort_compiler.load(files, target, built_with)
        sessions.append(weakref.ref(engine.session))
        return engine

    monkeypatch.setattr(ort_compiler, "COMPILER", replace(ort_compiler.COMPILER, load_frugally=frugally))
    with pytest.warns(DitforgeWarning, match="does not stream.*: it was not compiled to stream its weights"):
        chain = load(tmp_path / "engines", 2, slots=2)
    assert alive(sessions) == 0
    assert len(sessions) == 3  # one that is to stream, and both on demand
    inputs = example(manifest.read(tmp_path / "engines", "engines").components["dit"], SIZES[0])
    assert_close(chain.run(inputs)["velocity"], load(tmp_path / "engines").run(inputs)["velocity"])


def test_the_segments_that_stream_are_compiled_for_it(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that a step needs and that do not stay; a network that is needed once a prompt does not stream."""
    jobs: list[Job] = []

    def noted(job: Job) -> list[Path]:
        jobs.append(job)
        return ort_compiler.compile(job)

    compiler = replace(ort_compiler.COMPILER, compile=noted, load_frugally=lambda *_: pytest.fail("it is compiled"))
    monkeypatch.setattr(ort_compiler, "COMPILER", compiler)
    real, wanted = building.place_engines, Placement(segments=3, on_demand=2, slots=2)
    monkeypatch.setattr(building, "place_engines", lambda *args: real(*args) | {"dit": wanted})
    built = build(dit, tmp_path / "engines", BuildOptions("cpu"))
    assert [job.streams for job in jobs] == [False, True, True]
    assert built.manifest.engines["dit"].cache_key["segments that can stream"] == "2"
    wanted = Placement(segments=3, on_demand=3, slots=2)
    again = build(dit, tmp_path / "engines", BuildOptions("cpu"))
    assert again.rebuilt == {"dit": "segments that can stream was 2, is 3"}
    wanted = Placement(segments=3, on_demand=3)
    again = build(dit, tmp_path / "engines", BuildOptions("cpu"))
    assert again.rebuilt == {"dit": "segments that can stream was 3, is None"}
    assert not any(job.streams for job in jobs[-3:])


def test_the_next_segment_is_loaded_while_one_computes() -> None:
    """Each waits, as it computes, until the next one is being loaded."""
    loading = [threading.Event() for _ in range(4)]
    loading[3].set()

    class Part:
        def __init__(self, number: int) -> None:
            self.number, self.inputs, self.outputs = number, [f"x{number}"], [f"x{number + 1}"]

        def run_batch(self, parts: list[Arrays]) -> Arrays:
            assert loading[self.number + 1].wait(60)
            return {self.outputs[0]: parts[0][self.inputs[0]] + 1}

        def close(self) -> None: ...

    def waiting(number: int) -> OnDemand:
        def load() -> Any:
            loading[number].set()
            return Part(number)

        segment = OnDemand(load)
        segment.inputs, segment.outputs = [f"x{number}"], [f"x{number + 1}"]
        return segment

    chain = Chain([Part(0), waiting(1), waiting(2)], slots=2)  # type: ignore[list-item]
    assert chain.run({"x0": np.zeros(1)}) == {"x3": [3]}


def test_an_error_while_a_segment_is_loaded_ahead(dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the error of that call, after which nothing stays loaded, and the next call is right."""
    sessions: list[weakref.ref[ort.InferenceSession]] = []
    calls: list[int] = []
    real = ort_compiler.load

    def failing(*args):
        calls.append(len(calls))
        if calls[-1] == 5:  # three at the start, and then two of the first call
            raise RuntimeError("out of everything")
        engine = real(*args)
        sessions.append(weakref.ref(engine.session))
        return engine

    monkeypatch.setattr(ort_compiler, "COMPILER", replace(ort_compiler.COMPILER, load=failing))
    built = build(dit, tmp_path / "engines", BuildOptions("cpu", segments=3, residency="on-demand")).manifest
    chain = load(tmp_path / "engines", 3, 2)
    inputs = example(built.components["dit"], SIZES[0])
    with pytest.raises(RuntimeError, match="out of everything"):
        chain.run(inputs)
    assert alive(sessions) == 0
    assert_close(chain.run(inputs)["velocity"], load(tmp_path / "engines", 3, 1).run(inputs)["velocity"])


def alive(sessions: list[weakref.ref[ort.InferenceSession]]) -> int:
    return sum(session() is not None for session in sessions)


def test_a_lost_segment_shows_at_once(dit: Path, tmp_path: Path) -> None:
    build(dit, tmp_path / "engines", BuildOptions("cpu", segments=3, residency="on-demand"))
    (tmp_path / "engines" / "dit-2.onnx.data").unlink()
    with pytest.raises(UserError, match=r"dit-2\.onnx\.data is missing"):
        load(tmp_path / "engines")


def test_segments_in_another_order(dit: Path, tmp_path: Path) -> None:
    built = build(dit, tmp_path / "engines", BuildOptions("cpu", segments=3)).manifest
    engine = built.engines["dit"]
    first, *rest = engine.segment_files
    changed = {**built.engines, "dit": engine.model_copy(update={"segment_files": (*rest, first)})}
    manifest.write(built.model_copy(update={"engines": changed}), tmp_path / "engines")
    with pytest.raises(
        UserError, match=r"not in their order: segment 1 of 3 takes(.|\n)*fix: +ditforge build .* again"
    ):
        load(tmp_path / "engines")


def test_files_that_are_not_of_the_compiler(tmp_path: Path) -> None:
    made = Engine(compiler="onnxruntime", compiler_version="1", target="cpu", cache_key={})
    for name, content, said in (("dit.plan", b"a", r"dit\.plan is none"), ("dit.onnx", b"a", "cannot load the engine")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DitforgeError, match=f"{said}(.|\n)*fix: +ditforge build .* again"):
            load_engine(tmp_path, {name: manifest.describe(tmp_path / name)}, made)


@pytest.mark.parametrize(
    "said",
    [
        "Out of memory allocating 1,024 bytes (allocated so far: 0 bytes).",  # CuPy
        "cudaErrorMemoryAllocation: out of memory",
        "[E] Error Code 2: OutOfMemory (Requested size was 12884901888 bytes.)",  # TensorRT
    ],
)
def test_a_gpu_that_is_too_small(dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    build(dit, tmp_path / "engines", BuildOptions("cpu", segments=2))

    def fail(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(ort_compiler, "COMPILER", replace(ort_compiler.COMPILER, load=fail))
    with pytest.raises(DitforgeError, match="the GPU's memory does not hold the engine") as error:
        load(tmp_path / "engines")
    assert "--gpu-memory GIB" in error.value.fix


def test_the_same_picture_from_segments_on_demand(schnell, schnell_server, tmp_path: Path) -> None:
    engines, repository = tmp_path / "engines", tmp_path / "repo"
    build(schnell.onnx, engines, BuildOptions("cpu", segments=3, residency="on-demand"))
    assert all(difference.relative < 1e-4 for difference in compare(engines, schnell.onnx))
    write_repository(engines, repository)
    options = {"seed": 3, "steps": 3, "height": 64, "width": 96}
    with Client(schnell_server.url) as client:
        expected = np.asarray(client.generate("a red circle", **options), np.int16)
    with start(repository, port=0, log=tmp_path / "log") as server, Client(server.url) as client:
        picture = np.asarray(client.generate("a red circle", **options), np.int16)
    assert expected.std() > 5
    assert np.abs(picture - expected).max() <= 1
