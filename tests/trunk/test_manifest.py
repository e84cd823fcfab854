"""Manifests that somebody edited or broke: every stage answers with one error, which names the file and the field."""

from __future__ import annotations

import copy
import io
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings, strategies as st
from manifests import write_stage
from tritonclient.grpc import model_config_pb2 as pb

from ditforge import manifest
from ditforge.commands import inspect
from ditforge.contents import look_into
from ditforge.engines import build as building, verdict
from ditforge.engines.runtime.loading import load_engine
from ditforge.errors import DitforgeError, UserError
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.plan_report import make_report
from ditforge.plan_subject import Wanted
from ditforge.triton_repo.config import ENGINE_PARAMETER, EngineSource
from ditforge.triton_repo.repository import write_repository
from ditforge.triton_repo.server import check_gpu

VALUES: list[Any] = [
    *(None, True, 0, -1, 3, 2.5, 10**30, math.nan, "", "x", "FOO", "../x", "a\0", "ä" * 300, "1", "dit"),
    *([], [3], ["batch", 0], [["x"]], {}, {"x": 3}, {"0": 0}, {"x": {}}),
]
GONE = object()
PART = {"files": {"x": {"size": 1, "sha256": ""}}, "precision": "fp32", "reason": "", "inputs": {}, "outputs": {}}


def build(folder: Path, out: Path) -> None:
    building.build(folder, out, building.BuildOptions("rtx4090"))


def plan(folder: Path, out: Path) -> None:
    make_report(Wanted(CheckpointSource(folder)), "rtx4090")


def repo(folder: Path, out: Path) -> None:
    write_repository(folder, out)
    check_gpu(out)


def serve(folder: Path, out: Path) -> None:
    """As the models load their engines in Triton; those here are no graphs."""
    repo(folder, out)
    for file in out.glob("*/config.pbtxt"):
        parameters = text_format.Parse(file.read_text(), pb.ModelConfig()).parameters
        if ENGINE_PARAMETER in parameters:
            source = EngineSource.model_validate_json(parameters[ENGINE_PARAMETER].string_value)
            with suppress(DitforgeError):
                load_engine(file.parent / "1", source.files, source.made)


def inspected(folder: Path, out: Path) -> None:
    with redirect_stdout(io.StringIO()):
        inspect.say(look_into(folder))


def verify(folder: Path, out: Path) -> None:
    verdict.verify(folder)


STEPS: dict[str, tuple[manifest.Kind, Callable[[Path, Path], None]]] = {
    "build": ("onnx", build),
    "plan": ("onnx", plan),
    "inspect": ("engines", inspected),
    "verify": ("engines", verify),
    "repo": ("engines", repo),
    "serve": ("engines", serve),
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The folder of each kind, and what its manifest was."""
    root = tmp_path_factory.mktemp("stages")
    return {kind: (root / kind, write_stage(root / kind, kind)) for kind in ("onnx", "engines")}


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "write_engines", lambda *args: None)


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in it."""
    if path:
        yield path
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def changed(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at `path`, or with none."""
    made = copy.deepcopy(content)
    inner: Any = made
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return made


@pytest.mark.parametrize("step", STEPS)
def test_the_folders_are_good(step: str, stages: dict[str, Any], tmp_path: Path) -> None:
    kind, run = STEPS[step]
    folder, content = stages[kind]
    (folder / manifest.FILE_NAME).write_text(json.dumps(content))
    run(folder, tmp_path / "out")


FAULTS: list[tuple[str, tuple[str, ...], Any, str]] = [
    ("onnx", ("components", "tokenizer"), GONE, "no component tokenizer"),
    ("engines", ("components", "dit"), GONE, "engines.dit is the engine of no component"),
    ("onnx", ("components",), {}, "no component tokenizer"),
    ("engines", ("components", "clip", "files"), {}, r"components\.clip\.files has no file"),
    (
        "engines",
        ("components", "clip", "files", "clip.onnx", "size"),
        0,
        r"components\.clip\.files: clip\.onnx is empty",
    ),
    ("onnx", ("components", "clip", "files"), {"x": {"size": 1, "sha256": ""}}, r"clip\.files has no clip\.onnx"),
    ("engines", ("engines", "dit"), GONE, "engines has no dit"),
    ("engines", ("engines", "dit", "segments"), 3, r"engines\.dit: segments must be a list, got 3"),
    ("engines", ("engines", "dit", "segments"), None, r"engines\.dit: segments must be a list, got None"),
    ("engines", ("engines", "dit", "segment_files"), [["dit.onnx"], ["x"]], "segment_files has 2 parts, and placement"),
    (
        "engines",
        ("engines", "dit", "segment_files"),
        [["x"]],
        r"does not share out the files dit\.onnx, but has \[\['x",
    ),
    ("engines", ("engines", "dit", "segment_files"), [[]], r"engines\.dit: segment_files does not share out the files"),
    ("engines", ("engines", "dit", "placement", "segments"), 2, r"segment_files has 0 parts, and placement has 2"),
    ("engines", ("engines", "dit", "compiler"), "x", "compiler is 'x', and cache_key says 'onnxruntime'"),
    ("engines", ("engines", "dit", "compiler"), "tensorrt", "'tensorrt', and cache_key says 'onnxruntime'"),
    ("engines", ("engines", "dit", "compiler_version"), "2", "compiler_version is '2', and cache_key says '1'"),
    ("engines", ("engines", "dit", "target"), "sm_89", "target is 'sm_89', and cache_key says 'cpu'"),
    ("engines", ("components", "dit", "inputs", "latents", "dtype"), "FOO", "tensor latents has the dtype 'FOO'"),
    ("engines", ("components", "dit", "inputs", "latents", "shape"), ["batch", "x"], "the dimension 'x'"),
    ("engines", ("components", "dit", "inputs", "latents", "shape"), [], "the batch as its first dimension"),
    ("engines", ("components", "../x"), PART, r"'\.\./x' is no name of a network"),
    ("onnx", ("model", "max_tokens"), {}, r"model\.max_tokens names no text encoder"),
    ("onnx", ("model", "max_tokens"), {"clip": 9}, r"tokenizer: the tensor clip_ids has .*, and by model .* is 9"),
    ("onnx", ("model", "latent_channels"), 4, r"dit: the tensor latents has the shape \['batch', 16, .* is 4"),
    ("engines", ("kind",), "onnx", "kind is onnx, and there are engines, such as clip"),
    ("onnx", ("format",), True, "has format True"),
    ("onnx", ("format",), 2.0, r"has format 2\.0"),
]


@pytest.mark.parametrize(("kind", "path", "value", "problem"), FAULTS)
def test_the_field_is_named(
    kind: str, path: tuple[str, ...], value: Any, problem: str, stages: dict[str, Any], tmp_path: Path
) -> None:
    folder, content = stages[kind]
    (folder / manifest.FILE_NAME).write_text(json.dumps(changed(content, path, value)))
    with pytest.raises(UserError, match=f"{folder / manifest.FILE_NAME} .*{problem}(.|\n)*fix: +.* again"):
        (build if kind == "onnx" else repo)(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_key_that_is_there_twice(stages: dict[str, Any], tmp_path: Path) -> None:
    folder, content = stages["onnx"]
    (folder / manifest.FILE_NAME).write_text('{"format": 1, ' + json.dumps(content)[1:])
    with pytest.raises(
        UserError, match=r'manifest\.json is damaged: "format" is there twice(.|\n)*fix: +make .* again'
    ):
        build(folder, tmp_path / "out")


def test_a_graph_without_weights_is_good(stages: dict[str, Any], tmp_path: Path) -> None:
    folder, content = stages["engines"]
    whole = shutil.copytree(folder, tmp_path / "whole")
    (whole / "clip.onnx.data").touch()
    described = manifest.describe(whole / "clip.onnx.data").model_dump()
    content = changed(content, ("components", "clip", "files", "clip.onnx.data"), described)
    (whole / manifest.FILE_NAME).write_text(json.dumps(content))
    repo(whole, tmp_path / "out")


@pytest.mark.parametrize("text", ["{}", "no JSON", "", json.dumps({"model": {"type": "WordLevel", "vocab": {}}})])
def test_a_tokenizer_that_is_none(text: str, stages: dict[str, Any], tmp_path: Path) -> None:
    folder, content = stages["engines"]
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "clip.json").write_text(text)
    described = manifest.describe(broken / "clip.json").model_dump()
    content = changed(content, ("components", "tokenizer", "files", "clip.json"), described)
    (broken / manifest.FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"clip\.json is (no tokenizer|empty)(.|\n)*fix: +ditforge build .* again"):
        repo(broken, tmp_path / "out")


def test_plan_says_what_is_wrong_with_an_export(stages: dict[str, Any], tmp_path: Path) -> None:
    folder, content = stages["onnx"]
    (folder / manifest.FILE_NAME).write_text(json.dumps(changed(content, ("model", "max_tokens"), {})))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: model\.max_tokens"):
        plan(folder, tmp_path / "out")


def test_engines_without_a_needed_network(stages: dict[str, Any], tmp_path: Path) -> None:
    folder, content = stages["engines"]
    for name in ("dit", "vae_decoder", "tokenizer"):
        without = content
        for path in (("components", name), ("engines", name))[: 1 if name == "tokenizer" else 2]:
            without = changed(without, path, GONE)
        (folder / manifest.FILE_NAME).write_text(json.dumps(without))
        with pytest.raises(
            UserError, match=f"no component {name}, which is needed(.|\n)*from an export that has {name}"
        ):
            repo(folder, tmp_path / "out")


@pytest.mark.parametrize("step", STEPS)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_may_be_another(step: str, stages: dict[str, Any], data: st.DataObject) -> None:
    kind, run = STEPS[step]
    folder, content = stages[kind]
    path = data.draw(st.sampled_from(list(places(content))))
    content = changed(content, path, data.draw(st.sampled_from([*VALUES, GONE])))
    (folder / manifest.FILE_NAME).write_text(json.dumps(content))
    with TemporaryDirectory() as out, suppress(DitforgeError):
        run(folder, Path(out, "out"))
