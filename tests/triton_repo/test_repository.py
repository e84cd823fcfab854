"""The model repository: configurations that Triton's own protobuf reads, and everything a model needs in its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from ditforge import manifest
from ditforge.errors import UserError
from ditforge.model import Model
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
        files = {path.name for path in (schnell.repository / name / "1").iterdir()}
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
    assert Model.model_validate_json(text) == manifest.read(schnell.onnx, "onnx").model


def test_max_batch(schnell, tmp_path: Path) -> None:
    write_repository(schnell.engines, tmp_path / "repo", max_batch=3)
    assert {read_config(tmp_path / "repo", n).max_batch_size for n in ("dit", "text_encoders", "vae_decoder")} == {3}
    with pytest.raises(UserError, match="0"):
        write_repository(schnell.engines, tmp_path / "other", max_batch=0)


def test_a_folder_of_another_stage_is_refused(schnell, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds onnx") as error:
        write_repository(schnell.onnx, tmp_path / "repo")
    assert "ditforge build" in error.value.fix
    assert not list(tmp_path.iterdir())
