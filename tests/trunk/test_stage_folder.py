"""Where a stage writes: what it takes the place of, and what is known before it begins."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Result, assert_error, run_here, tree

from ditforge import manifest, stage_folder
from ditforge.engines.build import BuildOptions, build
from ditforge.errors import UserError
from ditforge.export import onnx_export
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.onnx_export import ExportOptions
from ditforge.triton_repo.repository import write_repository

FOLDERS = {"export": "onnx", "build": "engines", "repo": "repository"}


def of_another_model(folder: Path, out: Path, name: str = "other", **origin: str) -> Path:
    """A copy of a stage's folder in whose manifest the model has another name, or another origin."""
    shutil.copytree(folder, out)
    described = json.loads((out / "manifest.json").read_text())
    described["model"]["name"] = name
    described["origin"] |= origin
    (out / "manifest.json").write_text(json.dumps(described))
    return out


@pytest.mark.parametrize("command", ["build", "repo"])
def test_another_models_folder_is_replaced_only_by_force(
    schnell, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, made = (schnell.onnx, schnell.engines) if command == "build" else (schnell.engines, schnell.repository)
    out = of_another_model(made, tmp_path / "out")
    before = tree(out)
    arguments = [command, str(source), "--out", str(out)]
    refused = run_here(arguments, monkeypatch, capfd)
    assert_error(refused, f"{out} holds {FOLDERS[command]} of other, and this is random-schnell", "--force")
    assert tree(out) == before
    (out / "thesis.txt").touch()
    assert_error(
        run_here([*arguments, "--force"], monkeypatch, capfd), "holds thesis.txt, which ditforge did not write"
    )
    (out / "thesis.txt").unlink()
    assert run_here([*arguments, "--force"], monkeypatch, capfd).code == 0
    assert manifest.read_any(out).model.name == "random-schnell"


def test_another_models_export_is_known_before_tracing(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Traced(Exception):
        pass

    def traced(*args: object) -> None:
        raise Traced

    monkeypatch.setattr(onnx_export, "export_network", traced)
    source = CheckpointSource(schnell.checkpoint)
    other = of_another_model(schnell.onnx, tmp_path / "other")
    tuned = of_another_model(schnell.onnx, tmp_path / "tuned", "random-schnell", loras="style.safetensors:1")
    sized = of_another_model(schnell.onnx, tmp_path / "sized", "random-schnell", weights="random")
    for out, held in ((other, "other"), (tuned, "with style.safetensors:1"), (sized, "of random weights")):
        with pytest.raises(UserError, match=f"{held}, and this is random-schnell"):
            onnx_export.export_checkpoint(source, out, ExportOptions("fp16"))
        with pytest.raises(Traced):
            onnx_export.export_checkpoint(source, out, ExportOptions("fp16", force=True))
    same = shutil.copytree(schnell.onnx, tmp_path / "same")
    with pytest.raises(Traced):
        onnx_export.export_checkpoint(source, same, ExportOptions("fp16"))


def test_the_same_model_for_another_target_is_replaced(schnell, tmp_path: Path) -> None:
    out = shutil.copytree(schnell.engines, tmp_path / "engines")
    assert build(schnell.onnx, out, BuildOptions("cpu", segments=2)).rebuilt == {
        "dit": "segments was 1, is 2 (cutting 1)"
    }
    repo = shutil.copytree(schnell.repository, tmp_path / "repo")
    assert write_repository(out, repo)


@pytest.mark.parametrize("command", ["export", "build", "repo", "calibrate"])
def test_out_is_looked_at_before_anything_else(command: str, tmp_path: Path) -> None:
    """Before PyTorch is imported, or the input is looked at; nothing is left in the place that was tried."""
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    places = {"file/below": "file", "/proc/none/x": "/proc"}
    places |= {"mine": "is a folder"} if command == "calibrate" else {"file": "is a file", "mine": "thesis.txt"}
    given = str(Path(__file__).parents[2] / "models" / "flux-tiny") if command in ("export", "calibrate") else "missing"
    program = "import sys; sys.modules['torch'] = sys.modules['onnx'] = None\nfrom ditforge.cli import main; main()"
    before = tree(tmp_path)
    for out, mention in places.items():
        arguments = [sys.executable, "-c", program, command, given, "--out", out]
        done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert_error(Result(done.returncode, done.stdout, done.stderr), mention, "--out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("inside", "out"), [("", "."), ("", "../out"), ("tokenizer", "..")])
def test_the_current_folder_is_not_replaced(
    inside: str, out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell in it would be left in a folder that is gone."""
    here = tmp_path / "out" / inside
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    fix = f'cd {tmp_path}, and out="out"'
    with pytest.raises(UserError, match=f"{tmp_path}/out is the current folder, or has it inside(.|\n)*{fix}"):
        stage_folder.check_early(Path(out), "engines")
    with pytest.raises(UserError, match="is the current folder"), stage_folder.written_whole(Path(out), "engines"):
        pass
    assert here.samefile(".")


@pytest.mark.parametrize("out", ["onnx/engines", "onnx/below/engines"])
def test_a_folder_inside_of_a_stages_own_is_not_written(out: str, schnell, tmp_path: Path) -> None:
    """The outer one would hold files that its stage did not write, and could never be made again."""
    (tmp_path / "onnx").mkdir()
    shutil.copyfile(schnell.onnx / "manifest.json", tmp_path / "onnx" / "manifest.json")
    words = f'{tmp_path}/{out} is inside of {tmp_path}/onnx, which holds onnx(.|\n)*out="{tmp_path}/engines"'
    with pytest.raises(UserError, match=words):
        stage_folder.check_early(tmp_path / out, "engines")
    with pytest.raises(UserError, match=words), stage_folder.written_whole(tmp_path / out, "engines"):
        pass
    (tmp_path / "onnx" / "manifest.json").write_text('{"name": "of a web page"}')
    stage_folder.check_early(tmp_path / out, "engines")


@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_to_itself_is_not_replaced(below: str, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"{loop} is a symbolic link that leads to itself\nfix: +rm {loop}"):
        stage_folder.check_early(loop / below, "engines")
    with pytest.raises(UserError, match="leads to itself"), stage_folder.written_whole(loop / below, "engines"):
        pass
    assert sorted(tmp_path.iterdir()) == before


def test_where_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not keep the superuser, who runs tests in a container, from anything: the failure is put there."""

    def denied(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stage_folder.tempfile, "TemporaryDirectory", denied)
    with pytest.raises(UserError, match=f"cannot write {tmp_path}/a/b: {tmp_path}: Permission denied"):
        stage_folder.check_early(tmp_path / "a" / "b", "onnx")


THEIRS = [
    "notes.txt",
    "empty/",
    "dit/2/config.pbtxt",
    "tokenizer/notes.txt",
    "dit/1/notes.txt",
    "dit/2/mine",
    "tokenizer/link",
]


@pytest.mark.parametrize("stage", ["repo", "build"])
@pytest.mark.parametrize("theirs", THEIRS)
def test_files_of_others_are_never_deleted(schnell, tmp_path: Path, stage: str, theirs: str) -> None:
    """At any depth; and a link is not followed."""
    out = shutil.copytree(schnell.repository if stage == "repo" else schnell.engines, tmp_path / "out")
    file = out / theirs
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.name == "empty":
        file.mkdir()
    elif file.name == "link":
        file.symlink_to(tmp_path)
    else:
        file.write_text("mine")
    again = {
        "repo": lambda: write_repository(schnell.engines, out, max_batch=2),
        "build": lambda: build(schnell.onnx, out, BuildOptions(batch=2)),
    }
    with pytest.raises(UserError) as error:
        again[stage]()
    assert error.value.problem == f"{out} holds {theirs.rstrip('/')}, which ditforge did not write"
    assert os.path.lexists(file)


def test_what_a_repository_is_made_of_is_replaced(schnell, tmp_path: Path) -> None:
    out = shutil.copytree(schnell.repository, tmp_path / "out")
    assert "max_batch was 8, is 2" in write_repository(schnell.engines, out, max_batch=2)
