"""What `inspect` says a folder or file is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import ditforge
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from ditforge import manifest
from ditforge.client.grid import make_grid
from ditforge.client.picture_file import METADATA_KEY
from ditforge.commands.inspect import say
from ditforge.contents import look_into
from ditforge.errors import UserError
from ditforge.manifest import Engine, Manifest
from ditforge.reports import as_document


def inspected(path: Path, tmp_path: Path) -> dict[str, Any]:
    """The JSON document about it."""
    result = ditforge("inspect", path, "--json", cwd=tmp_path)
    assert (result.code, result.err) == (0, "")
    return json.loads(result.out)


def shown(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The text about it."""
    say(look_into(path))
    return capsys.readouterr().out


def test_folders_of_all_stages(schnell, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, kind in ((schnell.onnx, "onnx"), (schnell.engines, "engines"), (schnell.repository, "repository")):
        text = shown(folder, capsys)
        assert f"{kind} of random-schnell" in text
        assert all(name in text for name in ("tokenizer", "clip", "t5", "dit", "vae_decoder", "velocity"))
    assert "resident" in text and re.search(r"batch +up to 8", text)
    assert re.search(r"pictures +16 to 384 pixels in steps of 16, by default 96", text)
    assert re.search(r"checkpoint +random-schnell", text)  # from the export on


def described(folder: Path, found: Manifest, **changes: Any) -> Path:
    """A folder with a manifest alone."""
    folder.mkdir()
    manifest.write(found.model_copy(update=changes), folder)
    return folder


def test_one_file_of_a_stage_names_its_folder(schnell) -> None:
    for name in ("manifest.json", "dit.onnx", "dit.onnx.data"):
        with pytest.raises(UserError, match="one file of what a stage") as caught:
            look_into(schnell.onnx / name)
        assert str(schnell.onnx) in caught.value.fix


def test_engines_in_segments(schnell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = manifest.read(schnell.engines, "engines")
    model = found.model.model_copy(update={"sizes": ((64, 96), (96, 96)), "vae_tile": 64})
    made = {"compiler": "tensorrt-rtx", "compiler_version": "1.7", "target": "sm_89", "cache_key": {}, "max_batch": 4}
    cut = Engine(**made, segments=(("a",), ("b",), ("c",)), on_demand=2)
    dit = found.components["dit"]
    files = dict(zip("abc", [*dit.files.values(), *dit.files.values()], strict=False))
    components = {**found.components, "dit": dit.model_copy(update={"files": files})}
    engines = {**found.engines, "dit": cut, "t5": Engine(**made, on_demand=1)}
    origin = {"checkpoint": "flux.1-dev", "loras": "style.safetensors:0.8"}
    folder = described(tmp_path / "engines", found, model=model, components=components, engines=engines, origin=origin)
    text = shown(folder, capsys)
    assert re.search(r"^dit +fp32 +\d+\.\d MB +2 of 3 on-demand +3 +tensorrt-rtx 1\.7 for sm_89", text, re.MULTILINE)
    assert re.search(r"^t5 +fp32 +\d+\.\d MB +on-demand +1 ", text, re.MULTILINE)
    assert "only 96x64, 96x96 pixels (width x height); the autoencoder takes tiles of 64" in text
    assert re.search(r"batch +up to 4", text) and re.search(r"loras +style.safetensors:0.8", text)
    document = inspected(folder, tmp_path)
    assert document["pictures"]["sizes"] == [[64, 96], [96, 96]]
    (dit,) = (part for part in document["parts"] if part["name"] == "dit")
    assert (dit["segments"], dit["on_demand"], dit["target"]) == (3, 2, "sm_89")
    assert document["origin"] == origin


def test_equal_layers_are_one_row(schnell, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = manifest.read(schnell.onnx, "onnx")
    layers = {f"blocks.{number}.attn.to_q.weight": "fp8" for number in range(57)}
    dit = found.components["dit"].model_copy(update={"layers": {**layers, "blocks.57.attn.to_q.weight": "bf16"}})
    folder = described(tmp_path / "onnx", found, components={**found.components, "dit": dit})
    text = shown(folder, capsys)
    assert re.search(r"^dit +57 x blocks\.\*\.attn\.to_q\.weight +fp8 *$", text, re.MULTILINE)
    assert re.search(r"^dit +1 x blocks\.\*\.attn\.to_q\.weight +bf16 *$", text, re.MULTILINE)


def test_equal_folders_have_one_digest(schnell) -> None:
    onnx, engines = look_into(schnell.onnx), look_into(schnell.engines)
    assert onnx.sha256 == look_into(schnell.onnx).sha256 != engines.sha256


def test_a_checkpoint(random_schnell: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(random_schnell, capsys)
    assert "a checkpoint in diffusers' layout, FluxPipeline" in text
    assert re.search(r"^transformer +FluxTransformer2DModel +\d+\.\d MB", text, re.MULTILINE)


def test_files_of_tensors(random_schnell: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora, vae = tmp_path / "style.safetensors", random_schnell / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({"transformer.a.lora_A.weight": np.zeros((4, 8), np.float16)}, lora, {"author": "somebody"})
    document = inspected(lora, tmp_path)
    assert (document["kind"], document["tensors"], document["parameters"]) == ("adapter", 1, 32)
    assert (document["dtypes"], document["metadata"]) == ({"F16": 64}, {"author": "somebody"})
    assert "an adapter (LoRA) for no known model" in shown(lora, capsys).splitlines()[0]
    found = look_into(vae)
    assert found.kind == "checkpoint file" and "--base" in found.export
    assert found.parameters > 0 and set(found.dtypes) == {"F32"}


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("pipe", "not a regular file"), ("none", "does not exist"), ("a" * 300, "File name too long")):
        with pytest.raises(UserError, match=words):
            look_into(tmp_path / name)


def test_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [Image.new("RGB", (8, 8)) for _ in range(2)]
    for seed, image in enumerate(images):
        own = {"prompt": "a 'red' circle", "seed": seed, "sigmas": [1.0, 0.5, 0.0], "t5": True}
        image.info[METADATA_KEY] = json.dumps(own)
    grid = make_grid(images)
    info = PngInfo()
    info.add_itxt(METADATA_KEY, grid.info[METADATA_KEY])
    grid.save(tmp_path / "grid.png", pnginfo=info)
    lines = [line.strip().split(maxsplit=1) for line in shown(tmp_path / "grid.png", capsys).splitlines()]
    for row in (["columns", "2"], ["pictures", "2"], ["prompt", "a 'red' circle"], ["sigmas", "1.0, 0.5, 0.0"]):
        assert row in lines
    assert lines[-3:] == [["picture", "seed"], ["1", "0"], ["2", "1"]] and ["t5", "true"] in lines


def test_a_picture_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = Image.new("RGB", (8, 8))
    parameters = {"prompt": "a\x1b[31mb\x9b2J", "model": "m\x1b]0;x\x07"}
    info = PngInfo()
    info.add_itxt(METADATA_KEY, json.dumps(parameters, ensure_ascii=False))
    image.save(tmp_path / "a.png", pnginfo=info)
    text = shown(tmp_path / "a.png", capsys)
    assert r"a\x1b[31mb\x9b2J" in text and r"m\x1b]0;x\x07" in text
    save_file({"a": np.zeros(1, np.float16)}, tmp_path / "a.safetensors", {"author": "s\x1b[0m"})
    text += shown(tmp_path / "a.safetensors", capsys) + as_document(look_into(tmp_path / "a.png"))
    assert all(character.isprintable() or character == "\n" for character in text)
    assert json.loads(as_document(look_into(tmp_path / "a.png")))["parameters"] == parameters
