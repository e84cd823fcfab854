"""Engines by the real TensorRT-RTX compiler, which needs no GPU; what cannot be is refused before it starts."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import onnx
import pytest
import random_flux
import tensorrt_rtx as trt
from exports import alone, export_dits, replace_dit
from onnx import TensorProto, helper

from ditforge import local_gpu, manifest
from ditforge.engines import build as building
from ditforge.engines.build import TOKENIZER, BuildOptions, build
from ditforge.engines.compilers import Job, Ranges, tensorrt_common, tensorrt_rtx
from ditforge.engines.gpus import find_target
from ditforge.engines.runtime.loading import load_engine
from ditforge.engines.verify import verify_files
from ditforge.errors import DitforgeError, UserError
from ditforge.local_gpu import LocalGpu
from ditforge.manifest import Component, Tensor

NETWORKS = ("clip", "t5", "dit", "vae_decoder", "vae_encoder")
VERSION = version("tensorrt-rtx-cu13")
# What is compiled for each GPU: the DiT in every precision that the GPU has, (precision, what is around it).
# Engines for several GPUs are compiled for each of them, so these need no engine of their own as well.
FP32 = [("fp32", "fp32")]
FP16, BF16 = [("fp16", "fp16"), ("int8-weights", "fp16")], [("bf16", "bf16"), ("int8-weights", "bf16")]
FP8 = [("fp8-weights", "bf16"), ("fp8", "bf16")]


def without(folder: Path, out: Path, *names: str) -> Path:
    """A copy of an export that lacks some networks."""
    shutil.copytree(folder, out)
    described = json.loads((out / "manifest.json").read_text())
    for name in names:
        del described["components"][name]
    (out / "manifest.json").write_text(json.dumps(described))
    return out


@pytest.mark.parametrize(
    ("model", "gpu", "precisions"),
    [
        ("exports", "sm_89,sm_120", FP8),
        pytest.param("exports", "sm_86", FP32, marks=pytest.mark.matrix),
        pytest.param("exports", "sm_86,sm_89,sm_120", BF16, marks=pytest.mark.matrix),
        pytest.param("exports", "sm_75", FP16, marks=pytest.mark.matrix),
        pytest.param("sd3_exports", "sm_75", FP16, marks=pytest.mark.matrix),
        pytest.param("sd3_exports", "sm_80,sm_86", BF16, marks=pytest.mark.matrix),
        pytest.param("sd3_exports", "sm_89,sm_120", FP8, marks=pytest.mark.matrix),
    ],
)
def test_every_network_compiles_in_every_precision_of_the_gpu(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, gpu: str, precisions: list[tuple[str, str]]
) -> None:
    """FP8 is the DiT's alone; what is around it in bf16 is compiled for the same GPUs beside a DiT in bf16."""
    exports, around = request.getfixturevalue(model), None
    for key in precisions:
        onnx_dir = exports(*key)
        if precisions is FP8:
            onnx_dir = alone(onnx_dir, tmp_path / key[0])
        networks = set(manifest.read(onnx_dir, "onnx").components) - {TOKENIZER}
        built = build(onnx_dir, tmp_path / "engines", BuildOptions(gpu))
        # Only what differs is compiled again.
        assert set(built.rebuilt) == ({"dit"} if key[1] == around else networks)
        around = key[1]
        for name in networks:
            engine = built.manifest.engines[name]
            assert (engine.compiler, engine.compiler_version, engine.target) == ("tensorrt-rtx", VERSION, gpu)
            (plan,) = built.manifest.components[name].files
            weights = (onnx_dir / f"{name}.onnx.data").stat().st_size
            assert (tmp_path / "engines" / plan).stat().st_size > max(1000, 0.9 * weights)
        assert built.manifest.components["dit"].precision == key[0]
    tokenizers = built.manifest.components[TOKENIZER].files
    assert verify_files(tmp_path / "engines") == len(networks) + len(tokenizers)
    assert {path.suffix for path in (tmp_path / "engines").iterdir()} == {".plan", ".json", ""}


@pytest.mark.matrix
def test_the_plan_of_fp8_weights_is_smaller_by_half_of_what_is_8_bit(schnell, tmp_path: Path) -> None:
    """Modulation and embedders stay 16-bit, and so the whole is more than half of the bf16 one: here 0.67."""
    checkpoint, sizes = random_flux.save_wide(tmp_path), {}
    export_dits(checkpoint, None, "bf16", tmp_path, ["fp8-weights"])
    for name in ("bf16", "fp8-weights"):
        folder = without(schnell.onnx, tmp_path / "onnx" / name, *NETWORKS)
        replace_dit(tmp_path / name, folder)
        build(folder, tmp_path / "engines" / name, BuildOptions("sm_89"))
        sizes[name] = (tmp_path / "engines" / name / "dit.plan").stat().st_size
        weights = (folder / "dit.onnx.data").stat().st_size
        print(f"{name}: {weights} bytes of weights, a plan of {sizes[name]}")
        assert 0.98 < sizes[name] / weights < 1.1
    graph = onnx.load(folder / "dit.onnx", load_external_data=False).graph
    eight_bit = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT8E4M3FN]
    halved = sum(math.prod(tensor.dims) for tensor in eight_bit)
    print(f"{halved} weights are 8-bit; the plans' ratio is {sizes['fp8-weights'] / sizes['bf16']:.3f}")
    assert sizes["bf16"] - sizes["fp8-weights"] == pytest.approx(halved, rel=0.03)


@pytest.mark.parametrize("gpu", ["sm_75", "sm_86", "sm_89", "sm_120"])
def test_attention_that_no_kernel_does_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str) -> None:
    """Autoencoders of full size have one head of 512 channels."""
    shape = ("batch", 1, "tokens", 512)
    ports = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("q", "k", "v", "y")}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    graph = helper.make_graph([node], "attention", [ports[name] for name in ("q", "k", "v")], [ports["y"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]), tmp_path / "attention.onnx")
    tensor = Tensor(dtype="FP16", shape=shape)
    component = Component(
        files={}, precision="fp16", reason="", inputs=dict.fromkeys("qkv", tensor), outputs={"y": tensor}
    )
    shapes = dict.fromkeys("qkv", ((1, 1, 64, 512), (1, 1, 256, 512), (2, 1, 1024, 512)))
    path = tmp_path / "attention"
    job = Job("attention", component, tmp_path / "attention.onnx", path, find_target(gpu), [shapes], lambda *_: None)
    (plan,) = tensorrt_rtx.compile(job)
    assert plan.stat().st_size
    monkeypatch.setattr(tensorrt_common, "allow_unfused_attention", lambda *_: None)
    with pytest.raises(DitforgeError, match="not supported by a dedicated kernel"):
        tensorrt_rtx.compile(job)


def test_turing_has_no_fp32_products(schnell, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clip is in fp32, which tensorrt-rtx does not execute on sm_75") as error:
        build(schnell.onnx, tmp_path / "engines", BuildOptions("rtx2080ti"))
    assert "--precision int8-weights --activations fp16" in error.value.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("gpu", "key", "problem", "fix"),
    [
        ("rtx3090", FP8[0], "sm_86 has no FP8 tensor cores", "int8-weights   (or bf16)"),
        ("rtx3090", FP8[1], "sm_86 has no FP8 tensor cores, and dit is fp8", "int8-weights   (or bf16)"),
        ("a100", FP8[1], "sm_80 has no FP8 tensor cores", "int8-weights   (or bf16)"),
        ("sm_86,sm_89", FP8[0], "sm_86 has no FP8 tensor cores", "int8-weights"),
        ("t4", BF16[0], "sm_75 has no bf16 arithmetic", "--activations fp16"),
        ("t4", BF16[1], "sm_75 has no bf16 arithmetic", "--activations fp16"),
        ("h100", BF16[0], "do not run on sm_90", 'use compiler="tensorrt" on that machine'),
        ("rtx4090,b200", BF16[0], "do not run on sm_100", 'use compiler="tensorrt"'),
    ],
)
def test_the_impossible_is_refused_before_the_compiler_starts(
    exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: str, key: tuple[str, str], problem: str, fix: str
) -> None:
    monkeypatch.setattr(building, "compile_apart", lambda *_: pytest.fail("the compiler was started"))
    with pytest.raises(UserError, match=problem) as error:
        build(exports(*key), tmp_path / "engines", BuildOptions(gpu, "tensorrt-rtx"))
    assert fix in error.value.fix
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def clip(schnell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of one small network, fp32."""
    return without(schnell.onnx, tmp_path_factory.mktemp("clip") / "onnx", *(n for n in NETWORKS if n != "clip"))


def test_the_network_is_what_the_manifest_says(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Recorded(tensorrt_common.Build):
        def write(self) -> Path:
            network, profiles = self.network, self.config.num_optimization_profiles
            seen.append((network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED), profiles))
            seen.append([self.config.get_compute_capability(i) for i in range(self.config.num_compute_capabilities)])
            return super().write()

    monkeypatch.setattr(building, "compile_apart", lambda compiler, job: tensorrt_rtx.compile(job))
    monkeypatch.setattr(tensorrt_rtx, "Build", Recorded)
    build(clip, tmp_path / "engines", BuildOptions("sm_120,sm_86", static="96x96,128x96"))
    cc = trt.ComputeCapability
    assert seen == [(True, 1), [cc.SM86, cc.SM120]]  # the sizes differ, and for a text encoder make one profile
    path = clip / "manifest.json"
    text = path.read_text()
    try:
        for old, new in (('"clip_ids"', '"ids"'), ('"INT32"', '"UINT8"'), ('"FP32"', '"FP16"')):
            path.write_text(text.replace(old, new))
            with pytest.raises(DitforgeError, match="the manifest says"):
                build(clip, tmp_path / "other", BuildOptions("sm_89"))
    finally:
        path.write_text(text)
    assert not (tmp_path / "other").exists()


def test_a_plan_that_can_stream_is_the_same_but_for_a_flag(clip: Path, tmp_path: Path) -> None:
    """So a resident engine need not be compiled so, and one that is runs the same kernels."""
    component = manifest.read(clip, "onnx").components["clip"]
    shapes: list[Ranges] = [{"clip_ids": ((1, 33), (1, 33), (2, 33))}]
    plans = []
    for streams in (False, True):
        path, target = tmp_path / str(streams), find_target("sm_89")
        job = Job("clip", component, clip / "clip.onnx", path, target, shapes, lambda *_: None, streams=streams)
        (plan,) = tensorrt_rtx.compile(job)
        plans.append(plan.read_bytes())
    assert len(plans[0]) == len(plans[1])
    different = [at for at, (one, other) in enumerate(zip(*plans, strict=True)) if one != other]
    assert 0 < len(different) < 20  # a checksum, and the flag


def test_the_dits_profiles(schnell, tmp_path: Path) -> None:
    folder = without(schnell.onnx, tmp_path / "onnx", *(n for n in NETWORKS if n != "dit"))
    built = build(folder, tmp_path / "engines", BuildOptions("sm_89", resolutions="48-96-160", batch=2))
    key = built.manifest.engines["dit"].cache_key
    assert key["shapes of latents"] == "1x16x6x6 1x16x12x12 2x16x20x20"
    assert key["shapes of timestep"] == "1 1 2"
    assert built.manifest.engines["dit"].max_batch == 2
    assert (built.manifest.model.min_size, built.manifest.model.max_size) == (48, 160)
    assert build(folder, tmp_path / "engines", BuildOptions("sm_89", resolutions="48-96-160", batch=2)).rebuilt == {}
    rebuilt = build(folder, tmp_path / "engines", BuildOptions("sm_89", static="96x64,128x128", batch=2))
    assert rebuilt.rebuilt["dit"].startswith("shapes of latents was 1x16x6x6 1x16x12x12 2x16x20x20, is 1x16x8x12 ")
    assert rebuilt.manifest.model.sizes == ((64, 96), (128, 128))


def test_the_same_key_is_not_built_again(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "engines"
    assert build(clip, out, BuildOptions("rtx4090")).rebuilt == {"clip": "there was none before"}
    plan = out / "clip.plan"
    before = plan.stat().st_mtime_ns
    assert build(clip, out, BuildOptions("l40s")).rebuilt == {}  # the same compute capability
    assert (
        build(clip, out, BuildOptions("sm_89", resolutions="48-144")).rebuilt == {}
    )  # no input of a text encoder has sizes
    assert build(clip, out, BuildOptions("sm_89", resolutions="64-144")).rebuilt == {}
    assert build(clip, out, BuildOptions("rtx5090")).rebuilt == {"clip": "target was sm_89, is sm_120"}
    batched = BuildOptions("rtx5090", batch=2)
    assert build(clip, out, batched).rebuilt == {"clip": "shapes of clip_ids was 1x33 1x33 4x33, is 1x33 1x33 2x33"}
    compiler = replace(tensorrt_rtx.COMPILER, version=lambda: "9.9")
    monkeypatch.setattr(tensorrt_rtx, "COMPILER", compiler)
    assert build(clip, out, batched).rebuilt == {"clip": f"compiler_version was {VERSION}, is 9.9"}
    compiler = replace(tensorrt_rtx.COMPILER, settings=lambda: {"build_flags": "other"})
    monkeypatch.setattr(tensorrt_rtx, "COMPILER", compiler)
    assert build(clip, out, batched).rebuilt == {"clip": "build_flags was strongly typed, is other"}
    assert plan.stat().st_mtime_ns != before
    assert build(clip, out).rebuilt == {"clip": "compiler was tensorrt-rtx, is onnxruntime"}


def test_progress_has_the_compilers_phases(clip: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build(clip, tmp_path / "engines", BuildOptions("sm_89"), progress=lambda *step: seen.append(step))
    phases = {doing for doing, _, _ in seen}
    assert {"clip", "done", "clip: Building engine", "clip: Optimizing graph"} <= phases
    assert all(0 <= done <= total for _, done, total in seen)


def test_interrupted_in_the_compiler(clip: Path, tmp_path: Path) -> None:
    def interrupt(doing: str, done: int, total: int) -> None:
        if "Optimizing" in doing:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(clip, tmp_path / "engines", BuildOptions("sm_89"), progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_compiler(clip: Path, tmp_path: Path, number: int) -> None:
    def send(doing: str, done: int, total: int) -> None:
        if "Optimizing" in doing and done == 1:
            os.kill(os.getpid(), number)

    before = signal.signal(number, lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            build(clip, tmp_path / "engines", BuildOptions("sm_89"), progress=send)
    finally:
        signal.signal(number, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("gpu", "size"), [("sm_89", "1m"), ("cpu", "128k")])
def test_a_full_disk(clip: Path, tmp_path: Path, gpu: str, size: str) -> None:
    out = tmp_path / "small"
    out.mkdir()
    script = (
        "mount -t tmpfs -o size={size} none {out} && cd {out} && "
        "{python} -m ditforge build {clip} --gpu {gpu} --out engines; code=$?; ls -A; exit $code"
    )
    command = script.format(out=out, python=sys.executable, clip=clip, gpu=gpu, size=size)
    isolated = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*isolated, "true"]).returncode:
        pytest.skip("this machine lets nobody mount")
    done = subprocess.run([*isolated, "sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_parsed(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "check_files", lambda *_, **__: None)
    damaged = shutil.copytree(clip, tmp_path / "onnx")
    (damaged / "clip.onnx").write_bytes(b"no graph")
    with pytest.raises(DitforgeError, match=r"tensorrt_rtx .* cannot parse clip for sm_89"):
        build(damaged, tmp_path / "engines", BuildOptions("sm_89"))
    assert not (tmp_path / "engines").exists()


# Loading, as far as it goes without a GPU


@pytest.fixture
def engines(clip: Path, tmp_path: Path) -> Path:
    """A build of one network for sm_89."""
    build(clip, tmp_path / "engines", BuildOptions("sm_89"))
    return tmp_path / "engines"


def load(engines: Path, built_with: str = VERSION):
    built = manifest.read(engines, "engines")
    made = built.engines["clip"].model_copy(update={"compiler_version": built_with})
    return load_engine(engines, built.components["clip"].files, made)


def test_another_versions_engine_is_refused(engines: Path) -> None:
    with pytest.raises(UserError, match=f"compiled by tensorrt-rtx 1.0, and {VERSION} is installed") as error:
        load(engines, "1.0")
    assert "ditforge build ONNX_DIR --gpu local --compiler tensorrt-rtx" in error.value.fix


def test_another_gpus_engine_is_refused(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [LocalGpu("NVIDIA GeForce RTX 3090", "sm_86", 1, 1, "580")])
    with pytest.raises(UserError, match=r"are for sm_89, and this machine's GPU \(NVIDIA GeForce RTX 3090\) is sm_86"):
        load(engines)


def test_a_flipped_byte_is_found_before_loading(engines: Path) -> None:
    plan = engines / "clip.plan"
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)
    for check in (verify_files, load):
        with pytest.raises(UserError, match=r"clip\.plan is damaged"):
            check(engines)


def gpu_here() -> bool:
    return Path("/dev/nvidiactl").exists()


@pytest.mark.skipif(gpu_here(), reason="for machines without a GPU")
def test_no_driver(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no NVIDIA GPU"):
        load(engines)
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [LocalGpu("NVIDIA GeForce RTX 4090", "sm_89", 1, 1, "580")])
    with pytest.raises(DitforgeError, match=r"cannot load .*clip\.plan: .*driver") as error:
        load(engines)
    assert "ditforge build ONNX_DIR --gpu sm_89" in error.value.fix


def test_a_plan_that_is_none(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_gpu, "local_gpus", lambda: [LocalGpu("NVIDIA GeForce RTX 4090", "sm_89", 1, 1, "580")])
    (engines / "clip.plan").write_bytes(b"no plan" * 1000)
    with pytest.raises(DitforgeError, match=r"cannot load .*incompatible serialization version"):
        tensorrt_rtx.load([engines / "clip.plan"], "sm_89", VERSION)


def test_the_tokenizer_is_copied(clip: Path, engines: Path) -> None:
    before, after = (manifest.read(*folder).components[TOKENIZER] for folder in ((clip, "onnx"), (engines, "engines")))
    assert before == after
