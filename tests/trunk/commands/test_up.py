"""`ditforge up` with all that a checkpoint may be made of: what reaches the export, and which folder is its own."""

from __future__ import annotations

import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import tree

from ditforge import cli, manifest
from ditforge.commands import up
from ditforge.errors import UserError
from ditforge.export import onnx_export
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.options import SizeFlags


class Asked(Exception):
    """What an export was asked for, instead of making it."""


def asked(
    monkeypatch: pytest.MonkeyPatch, wanted: up.Wanted, cache: Path
) -> tuple[CheckpointSource, Path, onnx_export.ExportOptions]:
    """Checkpoint, folder and options of the export that `prepare` would make."""

    def export(source: CheckpointSource, out: Path, options: onnx_export.ExportOptions, progress: object) -> None:
        raise Asked(source, out, options)

    monkeypatch.setattr(onnx_export, "export_checkpoint", export)
    with pytest.raises(Asked) as error:
        up.prepare(wanted, cache)
    return error.value.args


def test_up_of_a_file_with_a_base_and_a_lora(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command line, with the session's export in place of another one; it is not served."""
    seen: list[CheckpointSource] = []
    served: list[Path] = []

    def export(source: CheckpointSource, out: Path, *args: object) -> None:
        seen.append(source)
        shutil.copytree(schnell.onnx, out, dirs_exist_ok=True)

    monkeypatch.setattr(onnx_export, "export_checkpoint", export)
    monkeypatch.setattr(up, "serve_in_foreground", lambda repository, *args: served.append(repository))
    for name in ("tuned.safetensors", "style.safetensors"):
        (tmp_path / name).touch()
    cache = tmp_path / "cache"
    options = ["--base", str(schnell.checkpoint), "--lora", f"{tmp_path / 'style.safetensors'}:0.8", "--port", "0"]
    cli.app(["up", str(tmp_path / "tuned.safetensors"), *options, "--cache", str(cache)], standalone_mode=False)
    loras = ((tmp_path / "style.safetensors", 0.8),)
    assert seen[0] == CheckpointSource(tmp_path / "tuned.safetensors", schnell.checkpoint, loras)
    (folder,) = cache.iterdir()
    assert folder.name.startswith("tuned+style-")
    assert served == [folder / "fp32" / "cpu" / "repo"]
    assert (
        manifest.read(served[0], "repository").components.keys()
        == manifest.read(schnell.onnx, "onnx").components.keys()
    )
    assert capsys.readouterr().out == f"wrote {served[0]}\n"
    before = tree(cache / folder.name / "fp32" / "cpu")
    cli.app(["up", str(schnell.checkpoint), "--cache", str(cache)], standalone_mode=False)
    assert len(list(cache.iterdir())) == 2
    assert tree(cache / folder.name / "fp32" / "cpu") == before


def test_whatever_makes_another_model_has_a_folder_of_its_own(
    random_schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    style, other = tmp_path / "style.safetensors", tmp_path / "other" / "style.safetensors"
    other.parent.mkdir()
    for file in (style, other):
        file.touch()
    plain = CheckpointSource(random_schnell)
    wanted = [
        up.Wanted(plain),
        up.Wanted(replace(plain, loras=((style, 1.0),))),
        up.Wanted(replace(plain, loras=((style, 0.5),))),
        up.Wanted(replace(plain, loras=((other, 1.0),))),
        up.Wanted(replace(plain, loras=((style, 1.0), (other, 1.0)))),
        up.Wanted(replace(plain, base=tmp_path)),
        up.Wanted(replace(plain, text_encoders="clip")),
        up.Wanted(replace(plain, random_weights=True)),
        up.Wanted(plain, calibration=tmp_path / "ranges.json"),
        up.Wanted(plain, calibration=tmp_path / "other" / "ranges.json"),
    ]
    folders = []
    for one in wanted:
        source, out, options = asked(monkeypatch, one, tmp_path)
        assert source == one.source
        assert options.calibration == one.calibration
        assert options.precision == ("fp8" if one.calibration else "fp32")
        folders.append(out.relative_to(tmp_path))
    assert len(set(folders)) == len(wanted)
    assert all(len(folder.parts) == 3 and folder.parts[0].startswith("random-schnell") for folder in folders)
    readable = [("+style", "fp32"), ("", "fp32-clip"), ("-random", "fp32"), ("", "fp8-fp32-ranges-")]
    for folder, (model, precision) in zip((folders[i] for i in (1, 6, 7, 8)), readable, strict=True):
        assert folder.parts[0].startswith(f"random-schnell{model}-")
        assert folder.parts[1].startswith(precision)


def test_a_published_model_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same folder from wherever the command is run."""
    flux, found = CheckpointSource(Path("flux.1-dev"), random_weights=True), []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        found.append(asked(monkeypatch, up.Wanted(flux, "rtx4090"), tmp_path)[1])
    assert found[0] == found[1]
    assert found[0].parts[-3].startswith("flux.1-dev-random-")


def test_a_calibration_for_a_gpu_without_fp8(random_schnell: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sm_86 has no FP8[\s\S]*int8-weights"):
        up.prepare(
            up.Wanted(CheckpointSource(random_schnell), "rtx3060", calibration=tmp_path / "ranges.json"), tmp_path
        )


def test_t5_in_a_precision_of_its_own(random_schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CheckpointSource(random_schnell)
    _, plain, _ = asked(monkeypatch, up.Wanted(source), tmp_path)
    seen, out, options = asked(monkeypatch, up.Wanted(replace(source, t5_precision="int8-weights")), tmp_path)
    t5 = options.asked(seen).t5
    assert t5 and t5.name == "int8-weights"
    assert out != plain
    with pytest.raises(UserError, match="fix:   t5_precision with"):
        up.prepare(up.Wanted(replace(source, t5_precision="fp9")), tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"resolutions": "64-96", "static": "64x64"}, "exclude each other"),
        ({"resolutions": "large"}, "large.* is not a range"),
        ({"static": "100x100"}, "divisible by 16, got 100"),
        ({"max_batch": 0}, "from 1 to 128, got 0"),
        ({"max_batch": 999_999_999}, "from 1 to 128, got 999999999"),
    ],
)
@pytest.mark.parametrize("random", [False, True])
def test_what_cannot_be_is_known_before_the_export(
    random_schnell: Path, tmp_path: Path, options: dict[str, Any], words: str, random: bool
) -> None:
    """Which takes hours where the model is large."""
    sizes = SizeFlags(**{name: value for name, value in options.items() if name != "max_batch"})
    source = CheckpointSource(random_schnell, random_weights=random)
    wanted = up.Wanted(source, sizes=sizes, max_batch=options.get("max_batch"))
    with pytest.raises(UserError, match=words):
        up.prepare(wanted, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--port", "--http-port", "--metrics-port"])
def test_a_port_in_use_is_known_before_the_export(random_schnell: Path, tmp_path: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port, free = str(taken.getsockname()[1]), [] if flag == "--port" else ["--port", "0"]
        arguments = ["up", str(random_schnell), flag, port, *free, "--cache", str(tmp_path)]
        with pytest.raises(UserError, match=f"port={port} is in use"):
            cli.app(arguments, standalone_mode=False)
    assert not list(tmp_path.iterdir())
