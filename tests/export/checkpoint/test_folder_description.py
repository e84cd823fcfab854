"""What `ditforge inspect FOLDER` says of checkpoints and parts of them, and that it needs no PyTorch."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import random_sd3
import torch
from command_line import PATIENCE
from safetensors.torch import load_file, save_file

from ditforge.commands.inspect import say
from ditforge.contents import CheckpointFolder, look_into
from ditforge.errors import UserError
from ditforge.export.checkpoint.description import TensorFile
from ditforge.export.checkpoint.layout import layouts

DIT = "transformer/diffusion_pytorch_model.safetensors"
LORA = {
    "base_model.model.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 72),
    "base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(72, 4),
}


@pytest.fixture
def folder(random_schnell: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(random_schnell, tmp_path / "some-model"))


def described(folder: Path) -> CheckpointFolder:
    found = look_into(folder)
    assert isinstance(found, CheckpointFolder)
    assert bool(found.export) != bool(found.problem) and bool(found.problem) == bool(found.fix)
    return found


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_checkpoint(folder: Path) -> None:
    found = described(folder)
    assert (found.kind, found.family, found.variant) == ("checkpoint", "FLUX.1", "FLUX.1-schnell")
    assert found.export == f"ditforge export {folder} --out DIR" and not found.noted
    parts = {part.name: part for part in found.parts}
    assert parts["transformer"].files == ("diffusion_pytorch_model.safetensors",)
    held = sum(tensor.nbytes for tensor in load_file(folder / DIT).values())
    assert parts["transformer"].dtypes == {"F32": held} and parts["transformer"].weights > held
    assert not parts["tokenizer"].files and found.weights == sum(part.weights for part in found.parts)


def test_the_tables_of_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say(described(folder))
    text = capsys.readouterr().out
    for words in ("model    FLUX.1-schnell", "export   ditforge export", "F32", "diffusion_pytorch_model.safetensors"):
        assert words in text


def test_a_model_that_its_files_leave_open(tmp_path: Path) -> None:
    """Large and large-turbo differ in nothing that a folder must say."""
    folder = random_sd3.save_large_turbo(tmp_path)
    assert described(folder).variant == "Stable Diffusion 3.5 large-turbo"
    (folder / "ditforge.json").unlink()
    found = described(folder)
    assert found.variant == "Stable Diffusion 3.5 large or Stable Diffusion 3.5 large-turbo"
    assert all(f'"{name}"' in found.fix or f"--variant {name}" in found.fix for name in ("large", "large-turbo"))


def test_several_files_and_variants(folder: Path) -> None:
    dit = load_file(folder / DIT)
    halves = {name: tensor.half() for name, tensor in dit.items()}
    save_file(halves, folder / "transformer" / "diffusion_pytorch_model.fp16.safetensors")
    save_file(halves, folder / "transformer" / "my-own.safetensors")
    save_file(LORA, folder / "pytorch_lora_weights.safetensors")
    found = described(folder)
    (transformer,) = (part for part in found.parts if part.name == "transformer")
    assert transformer.variants == ("fp16",) and set(transformer.dtypes) == {"F32"}
    assert any("my-own.safetensors" in note for note in found.noted)
    assert any("a LoRA is applied only with" in note for note in found.noted)
    (folder / DIT).unlink()
    (transformer,) = (part for part in described(folder).parts if part.name == "transformer")
    assert transformer.files == ("diffusion_pytorch_model.fp16.safetensors",) and set(transformer.dtypes) == {"F16"}


def packed(folder: Path) -> None:
    change(folder / "transformer" / "config.json", quantization_config={"quant_method": "torchao"})
    tensors = load_file(folder / DIT)
    save_file(tensors | {"transformer_blocks.0.attn.to_q.weight": torch.zeros(72, 72, dtype=torch.int8)}, folder / DIT)


@pytest.mark.parametrize(
    ("spoil", "problem", "fix"),
    [
        (packed, "packed by torchao", "original repository"),
        (lambda folder: shutil.rmtree(folder / "vae"), "vae is missing", "copy the folder vae"),
        (lambda folder: (folder / DIT).write_bytes(b"version https://git-lfs"), "pointer of Git LFS", "git lfs pull"),
        (
            lambda folder: change(folder / "model_index.json", _class_name="FluxImg2ImgPipeline"),
            "FluxImg2ImgPipeline",
            "write that as _class_name",
        ),
        (lambda folder: change(folder / "model_index.json", _class_name="ChromaPipeline"), "Chroma", "FluxPipeline"),
        (
            lambda folder: (folder / "text_encoder" / "model.safetensors").rename(
                folder / "text_encoder" / "pytorch_model.bin"
            ),
            "only pytorch_model.bin",
            "model.safetensors",
        ),
    ],
)
def test_what_cannot_be_exported(spoil: Any, problem: str, fix: str, folder: Path) -> None:
    spoil(folder)
    found = described(folder)
    assert problem in found.problem and fix in found.fix
    assert {part.name for part in found.parts} >= {"transformer", "vae", "tokenizer"}


def test_the_method_that_a_configuration_names(folder: Path) -> None:
    packed(folder)
    assert {part.quantisation for part in described(folder).parts} == {"", "torchao"}


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_a_transformer_alone(inner: str, random_schnell: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trained" / inner
    shutil.copytree(random_schnell / "transformer", tmp_path / "trained" / "transformer")
    found = described(folder)
    assert found.kind == "part of a checkpoint" and found.family == "FLUX.1"
    assert found.variant == "FLUX.1-schnell or FLUX.1-dev without its distilled guidance"
    assert "--base FOLDER" in found.export and [part.name for part in found.parts] == ["transformer"]
    change(tmp_path / "trained" / "transformer" / "config.json", _class_name="ChromaTransformer2DModel")
    assert "ChromaTransformer2DModel" in described(folder).problem


def test_folders_with_one_file(tmp_path: Path) -> None:
    """A folder that PEFT wrote is described as its file, with its configuration."""
    save_file(LORA, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    found = look_into(tmp_path)
    assert isinstance(found, TensorFile) and found.adapter and found.adapter.alphas == {"16": 1}
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "a.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"2 .safetensors files[\s\S]*give one of them"):
        look_into(tmp_path)


def test_folders_of_other_things(random_schnell: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint and no output of ditforge"):
        look_into(tmp_path)
    with pytest.raises(UserError, match="give the whole checkpoint"):
        look_into(random_schnell / "tokenizer")


@pytest.mark.parametrize("layout", layouts(), ids=lambda layout: layout.title)
def test_defaults_are_those_of_diffusers(layout: Any) -> None:
    parameters = inspect.signature(getattr(diffusers, layout.class_name)).parameters
    assert layout.defaults == {name: parameters[name].default for name in layout.defaults}
    assert hasattr(diffusers, layout.pipeline)


def test_no_pytorch_is_needed(folder: Path) -> None:
    code = """
import sys
from pathlib import Path
from ditforge.contents import look_into
print(look_into(Path(sys.argv[1])).variant, {"torch", "diffusers", "transformers"} & sys.modules.keys())
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert result.stdout.strip() == "FLUX.1-schnell set()"
