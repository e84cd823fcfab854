"""The model repository: configurations that Triton's own protobuf reads, and everything a model needs in its folder."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import onnx
import pytest
from command_line import tree
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from ditforge import manifest
from ditforge.engines.verify import verify_files
from ditforge.errors import UserError
from ditforge.placement import Placement
from ditforge.served_model import read_served_model
from ditforge.triton_repo import repository
from ditforge.triton_repo.config import EngineSource
from ditforge.triton_repo.repository import write_repository


def read_config(repository: Path, name: str) -> pb.ModelConfig:
    return text_format.Parse((repository / name / "config.pbtxt").read_text(), pb.ModelConfig())


def test_every_component_is_a_model(schnell) -> None:
    built = manifest.read(schnell.engines, "engines")
    for name, component in built.components.items():
        config = read_config(schnell.repository, name)
        assert (config.name, config.backend, config.max_batch_size) == (name, "python", 8)
        assert [tensor.name for tensor in config.input] == list(component.inputs)
        assert [tensor.name for tensor in config.output] == list(component.outputs)
        assert config.HasField("dynamic_batching")
        files = {path.name for path in (schnell.repository / name / "1").iterdir()} - {"__pycache__"}  # of a server
        assert files == {"model.py", *(Path(file).name for file in component.files)}


def test_sizes_vary_and_numbers_travel_as_columns(schnell) -> None:
    inputs = {tensor.name: tensor for tensor in read_config(schnell.repository, "dit").input}
    assert list(inputs["latents"].dims) == [16, -1, -1]
    assert list(inputs["timestep"].dims) == [1]
    assert inputs["timestep"].HasField("reshape")
    assert list(inputs["timestep"].reshape.shape) == []
    assert list(inputs["prompt_embeds"].dims) == [40, 56]


def test_the_ensemble_is_wired_by_names(schnell) -> None:
    config = read_config(schnell.repository, "text_encoders")
    assert config.platform == "ensemble"
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["tokenizer", "clip", "t5"]
    assert [tensor.name for tensor in config.input] == ["prompt"]
    assert {tensor.name for tensor in config.output} == {"prompt_embeds", "pooled_embeds", "prompt_tokens"}


def test_the_dit_carries_what_a_client_must_know(schnell) -> None:
    text = read_config(schnell.repository, "dit").parameters["ditforge_model"].string_value
    assert read_served_model(text) == manifest.read(schnell.onnx, "onnx").model


def test_the_dit_says_of_which_engines_it_is(schnell, tmp_path: Path) -> None:
    def said(repository: Path) -> str:
        return read_config(repository, "dit").parameters["ditforge_engines"].string_value

    components = manifest.read(schnell.engines, "engines").components.values()
    names = sorted(name for component in components for name in component.files)
    assert "dit.onnx" in names
    listed = [f"{sha256((schnell.engines / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    assert said(schnell.repository) == sha256("".join(listed).encode()).hexdigest()
    write_repository(schnell.engines, tmp_path / "repo", max_batch=3)
    assert said(tmp_path / "repo") == said(schnell.repository)  # the same engines, however they are called


def test_max_batch(schnell, tmp_path: Path) -> None:
    write_repository(schnell.engines, tmp_path / "repo", max_batch=3)
    assert {read_config(tmp_path / "repo", n).max_batch_size for n in ("dit", "text_encoders", "vae_decoder")} == {3}
    for no_batch in (0, 129, 999_999_999):
        with pytest.raises(UserError, match=f"from 1 to 128, got {no_batch}"):
            write_repository(schnell.engines, tmp_path / "other", max_batch=no_batch)


def test_a_folder_of_another_stage_is_refused(schnell, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder of ONNX graphs") as error:
        write_repository(schnell.onnx, tmp_path / "repo")
    assert "ditforge build" in error.value.fix
    assert not list(tmp_path.iterdir())


# TensorRT's engines: their plans are executed by docs/gpu-checklist.md; here are the configurations


def compiled(engines: Path, out: Path, compiler: str, model: dict[str, Any]) -> Path:
    """A build as `compiler` would have written it, for batches of up to 4: plans in the place of graphs."""
    source = manifest.read(engines, "engines")
    shutil.copytree(engines / "tokenizer", out / "tokenizer")
    components, made = {}, {}
    for name, component in source.components.items():
        if name in source.engines:
            (out / f"{name}.plan").write_bytes(name.encode())
            files = {f"{name}.plan": manifest.describe(out / f"{name}.plan")}
            component = component.model_copy(update={"files": files})
            update = {"compiler": compiler, "compiler_version": "9", "target": "sm_89", "max_batch": 4}
            update["triton_backend"] = "tensorrt" if compiler == "tensorrt" else ""
            made[name] = source.engines[name].model_copy(update={**update, "cache_key": {}})
        components[name] = component
    announced = source.model.model_copy(update=model)
    manifest.write(source.model_copy(update={"model": announced, "components": components, "engines": made}), out)
    return out


@pytest.fixture
def tritonserver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Triton on PATH, whose folder of TensorRT's backend is returned."""
    binary = tmp_path / "opt" / "bin" / "tritonserver"
    binary.parent.mkdir(parents=True)
    binary.touch(0o755)
    monkeypatch.setenv("PATH", str(binary.parent), prepend=os.pathsep)
    backend = tmp_path / "opt" / "backends" / "tensorrt"
    backend.mkdir(parents=True)
    return backend


def shapes(inputs: Mapping[str, Any]) -> dict[str, list[int]]:
    return {
        name: list(described.dims if hasattr(described, "dims") else described.dim)
        for name, described in inputs.items()
    }


def test_a_plan_is_tritons_own_model(schnell, tmp_path: Path, tritonserver: Path) -> None:
    sizes = ((64, 96), (128, 128))
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt", {"sizes": sizes, "default_size": 96})
    write_repository(engines, tmp_path / "repo")
    for name in ("clip", "t5", "dit", "vae_decoder", "vae_encoder"):
        config = read_config(tmp_path / "repo", name)
        assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "", 4)
        assert [path.name for path in (tmp_path / "repo" / name / "1").iterdir()] == [config.default_model_filename]
        (group,) = config.instance_group
        assert (group.kind, group.count, list(group.gpus)) == (pb.ModelInstanceGroup.KIND_GPU, 1, [0])
        assert config.optimization.cuda.graphs
        counts = (len(config.model_warmup), len(config.optimization.cuda.graph_spec))
        assert counts == ((1, 1) if name in ("clip", "t5") else (2, 2))
    config = read_config(tmp_path / "repo", "dit")
    first, second = config.optimization.cuda.graph_spec
    assert first.batch_size == second.batch_size == 1
    assert shapes(second.input) == {
        "latents": [16, 16, 16],
        "timestep": [],
        "prompt_embeds": [40, 56],
        "pooled_embeds": [48],
    }
    warmup = config.model_warmup[0]
    assert shapes(warmup.inputs) == {
        "latents": [16, 8, 12],
        "timestep": [1],  # as it travels
        "prompt_embeds": [40, 56],
        "pooled_embeds": [48],
    }
    assert all(tensor.zero_data and tensor.data_type == pb.TYPE_FP32 for tensor in warmup.inputs.values())
    assert read_served_model(config.parameters["ditforge_model"].string_value).sizes == sizes
    assert read_config(tmp_path / "repo", "tokenizer").backend == "python"


def test_dynamic_shapes_have_no_graphs(schnell, tmp_path: Path, tritonserver: Path) -> None:
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt", {})
    write_repository(engines, tmp_path / "repo")
    config = read_config(tmp_path / "repo", "vae_decoder")
    assert not config.optimization.cuda.graphs and not config.optimization.cuda.graph_spec
    assert shapes(config.model_warmup[0].inputs) == {"latents": [16, 12, 12]}


@pytest.mark.parametrize("compiler", ["tensorrt-rtx", "tensorrt"])
def test_python_runs_what_triton_has_no_backend_for(schnell, tmp_path: Path, tritonserver: Path, compiler: str) -> None:
    tritonserver.rmdir()
    engines = compiled(schnell.engines, tmp_path / "engines", compiler, {})
    write_repository(engines, tmp_path / "repo")
    config = read_config(tmp_path / "repo", "dit")
    assert (config.backend, config.instance_group[0].kind) == ("python", pb.ModelInstanceGroup.KIND_CPU)
    source = EngineSource.model_validate_json(config.parameters["ditforge_engine"].string_value)
    assert (source.made.compiler, source.made.compiler_version, source.made.target) == (compiler, "9", "sm_89")
    assert {path.name for path in (tmp_path / "repo" / "dit" / "1").iterdir()} == {"model.py", "dit.plan"}


@pytest.mark.parametrize("change", [Placement(segments=2), Placement(on_demand=1)], ids=["segments", "on_demand"])
def test_python_runs_segments_and_what_is_loaded_on_demand(
    schnell, tmp_path: Path, tritonserver: Path, change: Placement
) -> None:
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt", {})
    assert write_repository(engines, tmp_path / "repo") == "there was none before"
    assert read_config(tmp_path / "repo", "dit").platform == "tensorrt_plan"
    source = manifest.read(engines, "engines")
    dit, engine, files = source.components["dit"], source.engines["dit"], ("dit.plan",)
    if change.segments == 2:
        files = ("dit.plan", "dit-2.plan")
        (engines / "dit-2.plan").write_bytes(b"the second half")
        engine = engine.model_copy(update={"segment_files": tuple((file,) for file in files)})
    dit = dit.model_copy(update={"files": {file: manifest.describe(engines / file) for file in files}})
    update = {"components": {**source.components, "dit": dit}}
    update["engines"] = {**source.engines, "dit": engine.model_copy(update={"placement": change})}
    manifest.write(source.model_copy(update=update), engines)
    assert write_repository(engines, tmp_path / "repo") == "what runs dit was tensorrt_plan, is python"
    config = read_config(tmp_path / "repo", "dit")
    described = EngineSource.model_validate_json(config.parameters["ditforge_engine"].string_value)
    assert described.made.placement == change
    assert read_config(tmp_path / "repo", "clip").platform == "tensorrt_plan"


def test_batches_that_the_engines_do_not_take(schnell, tmp_path: Path) -> None:
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt-rtx", {})
    with pytest.raises(UserError, match="up to 4, not 8") as error:
        write_repository(engines, tmp_path / "repo", max_batch=8)
    assert "max_batch=4" in error.value.fix and "--batch 8" in error.value.fix


def test_an_engine_in_segments_has_a_file_for_each(schnell, tmp_path: Path) -> None:
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt-rtx", {})
    source, names = manifest.read(engines, "engines"), ("dit-1.plan", "dit-2.plan")
    for name in names:
        (engines / name).write_bytes(name.encode())
    (engines / "dit.plan").unlink()
    files = {name: manifest.describe(engines / name) for name in names}
    dit = source.components["dit"].model_copy(update={"files": files})
    engine = source.engines["dit"].model_copy(update={"segments": tuple((name,) for name in names)})
    update = {"components": {**source.components, "dit": dit}, "engines": {**source.engines, "dit": engine}}
    manifest.write(source.model_copy(update=update), engines)
    write_repository(engines, tmp_path / "repo")
    folder = tmp_path / "repo" / "dit" / "1"
    assert {path.name for path in folder.iterdir()} == {*names, "model.py"}
    assert write_repository(engines, tmp_path / "repo", max_batch=2) == "max_batch was 4, is 2"


# Written once


def replace_plan(engines: Path, name: str, content: bytes) -> None:
    """As `ditforge build` does it: a new folder in the old one's place."""
    folder = shutil.copytree(engines, engines.with_name("rebuilt"))
    (folder / f"{name}.plan").write_bytes(content)
    source = manifest.read(folder, "engines")
    files = {f"{name}.plan": manifest.describe(folder / f"{name}.plan")}
    component = source.components[name].model_copy(update={"files": files})
    manifest.write(source.model_copy(update={"components": {**source.components, name: component}}), folder)
    shutil.rmtree(engines)
    folder.rename(engines)


def test_the_same_repository_is_not_written_again(schnell, tmp_path: Path) -> None:
    out = tmp_path / "repo"
    assert write_repository(schnell.engines, out) == "there was none before"
    before, inode = tree(out), out.stat().st_ino
    assert write_repository(schnell.engines, out, max_batch=8) == ""  # which is the default
    assert (tree(out), out.stat().st_ino) == (before, inode)


def test_what_differs_is_the_reason(schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines, out = compiled(schnell.engines, tmp_path / "engines", "tensorrt", {}), tmp_path / "repo"
    monkeypatch.setattr(repository, "has_tensorrt_backend", lambda: False)

    def reason(max_batch: int | None = None) -> str:
        first = write_repository(engines, out, max_batch)
        assert write_repository(engines, out, max_batch) == ""
        assert (out / "dit" / "1" / "dit.plan").read_bytes() == (engines / "dit.plan").read_bytes()
        return first

    assert reason() == "there was none before"
    assert reason(max_batch=3) == "max_batch was 4, is 3"
    assert reason() == "max_batch was 3, is 4"
    replace_plan(engines, "dit", b"another engine")
    assert reason() == "sha256 of dit.plan changed"
    source = manifest.read(engines, "engines")
    newer = {**source.engines, "t5": source.engines["t5"].model_copy(update={"compiler_version": "10"})}
    manifest.write(source.model_copy(update={"engines": newer}), engines)
    assert reason() == "compiler of t5 was tensorrt 9 for sm_89, is tensorrt 10 for sm_89"
    model = source.model.model_copy(update={"default_steps": 7})
    manifest.write(source.model_copy(update={"engines": newer, "model": model}), engines)
    assert reason() == "sha256 of dit/config.pbtxt changed"
    monkeypatch.setattr(repository, "has_tensorrt_backend", lambda: True)
    assert reason() == "what runs clip was python, is tensorrt_plan"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("clip/config.pbtxt", "clip/config.pbtxt is missing or changed"),
        ("dit/1/model.py", "dit/1/model.py is missing or changed"),
        ("t5/1/t5.onnx.data", "a file of t5 is missing or truncated"),
        ("text_encoders/1", "text_encoders/1 is missing"),
        ("manifest.json", "there was none before"),
    ],
)
def test_what_is_lost_is_written_again(schnell, tmp_path: Path, path: str, reason: str) -> None:
    out = Path(shutil.copytree(schnell.repository, tmp_path / "repo"))
    lost = out / path
    if path == "manifest.json":
        shutil.rmtree(out)
    elif lost.is_dir():
        lost.rmdir()
    else:
        lost.write_bytes(lost.read_bytes()[:-1])
    assert write_repository(schnell.engines, out) == reason
    assert lost.exists() and write_repository(schnell.engines, out) == ""


def test_a_plan_is_stored_once(schnell, tmp_path: Path) -> None:
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt-rtx", {})
    plan, served = engines / "dit.plan", tmp_path / "repo" / "dit" / "1" / "dit.plan"
    write_repository(engines, tmp_path / "repo")
    assert plan.samefile(served)
    replace_plan(engines, "dit", b"another engine")
    assert served.read_bytes() == b"dit"  # what is served stays until the repository is written again
    assert verify_files(tmp_path / "repo") == verify_files(engines)
    write_repository(engines, tmp_path / "repo")
    plan.write_bytes(b"anOther engine")
    for folder in (engines, tmp_path / "repo"):
        with pytest.raises(UserError, match=r"dit\.plan is damaged"):
            verify_files(folder)


def test_the_weights_of_inductor_are_stored_once(schnell, tmp_path: Path) -> None:
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt-rtx", {})
    source, names = manifest.read(engines, "engines"), ("dit.inductor", "dit.safetensors", "dit-0-begin.pt2")
    (engines / "dit.plan").unlink()
    for name in names:
        (engines / name).write_bytes(name.encode())
    files = {name: manifest.describe(engines / name) for name in names}
    source.components["dit"] = source.components["dit"].model_copy(update={"files": files})
    manifest.write(source, engines)
    write_repository(engines, tmp_path / "repo")
    served = tmp_path / "repo" / "dit" / "1"
    assert [(served / name).samefile(engines / name) for name in names] == [False, True, True]


def test_a_plan_is_copied_where_there_are_no_links(schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: Path, link: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    engines = compiled(schnell.engines, tmp_path / "engines", "tensorrt-rtx", {})
    write_repository(engines, tmp_path / "repo")
    served = tmp_path / "repo" / "dit" / "1" / "dit.plan"
    assert not served.samefile(engines / "dit.plan")
    assert served.read_bytes() == b"dit"


def test_onnx_reads_what_is_served_on_a_cpu(schnell) -> None:
    """It refuses weights that have several names."""
    for graph in (schnell.engines / "dit.onnx", schnell.repository / "dit" / "1" / "dit.onnx"):
        assert onnx.load(graph).graph.node
