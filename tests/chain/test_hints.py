"""What errors tell to do: commands that can be parsed, and options that the failed command has."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Result, assert_error, run_here

from ditforge.cli import app
from ditforge.engines.build import build
from ditforge.errors import UserError
from ditforge.export.disk_space import check_space
from ditforge.stage_folder import OTHER_OUT
from ditforge.triton_repo.server import how_it_ended, start

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TINY = Path(__file__).parents[2] / "models" / "flux-tiny"
# A command ends where its explanation begins: behind three spaces, a bracket or a mark.
COMMAND = re.compile(r"ditforge [a-z]+(?: (?!  )[^ ;,()]+)*")


def commands_in(fix: str) -> Iterator[list[str]]:
    """The commands of ditforge in a fix, each as its words."""
    for found in COMMAND.findall(fix):
        words = shlex.split(found)[1:]
        if words[0] in COMMANDS:
            yield words


def check(fix: str, command: str) -> None:
    """Each command in the fix is taken by its parser, and each lone option by the `command` that failed."""
    for name, *arguments in commands_in(fix):
        parsed = COMMANDS[name]
        parsed.make_parser(parsed.context_class(parsed)).parse_args(list(arguments))
    rest = COMMAND.sub("", fix)
    known = {flag for parameter in COMMANDS[command].params for flag in parameter.opts}
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest):
        assert flag in known, f"{command} has no {flag}: {fix}"


@pytest.fixture
def paths(schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders of all stages by name, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    gpu = shutil.copytree(schnell.repository, tmp_path / "gpu")
    for engine in (described := json.loads((gpu / "manifest.json").read_text()))["engines"].values():
        engine["target"] = engine["cache_key"]["target"] = "sm_10"  # which no driver of today has
    (gpu / "manifest.json").write_text(json.dumps(described))
    others = {}
    for name, changed in {"GPU_ENGINES": {"target": "sm_10"}, "STRANGE": {"compiler": "strange"}}.items():
        others[name] = shutil.copytree(schnell.engines, tmp_path / name)
        described = json.loads((others[name] / "manifest.json").read_text())
        for engine in described["engines"].values():
            engine.update(changed)
            engine["cache_key"].update(changed)
        (others[name] / "manifest.json").write_text(json.dumps(described))
    (tmp_path / "file").touch()
    made = {"ONNX": schnell.onnx, "ENGINES": schnell.engines, "REPO": schnell.repository, "GPU": gpu}
    return {**made, **others, "CHECKPOINT": schnell.checkpoint, "TINY": TINY, "FILE": tmp_path / "file"}


CASES = {
    "plan TINY --gpu cpu": "the CPU is no GPU",
    "plan TINY --gpu sm_89": "sm_89 is no product",
    "plan TINY --gpu-memory 8": "that of one GPU",
    "plan TINY --gpu rtx3060 --precision fp8": "no FP8",
    "plan ENGINES": "holds engines, and not a checkpoint",
    "plan FILE": "is not a checkpoint",
    "build ONNX --static 1024x1024 --out o": "makes 16 to 384 pixels, got 1024",
    "build ONNX --resolutions 512-1536 --out o": "got 512",
    "build ONNX --resolutions 100-200 --out o": "divisible by 16",
    "build ONNX --gpu cpu --compiler tensorrt-rtx --out o": "not for the CPU",
    "build ENGINES --out o": "is a folder of engines, and a folder of ONNX graphs is what this takes",
    "export FILE --out o": "is not a checkpoint",
    "export ONNX --out o": "holds ONNX graphs, and not a checkpoint",
    "export missing.safetensors --out o": "missing.safetensors does not exist",
    "export '' --out o": "the path is empty",
    "export TINY --out ''": "the path is empty",
    "up FILE --port 0": "is not a checkpoint",
    "up missing.safetensors --base TINY --port 0": "missing.safetensors does not exist",
    "up TINY --cache FILE --port 0": "nothing can be kept in --cache",
    "up REPO --port 0": "a model repository, and not a checkpoint",
    "serve ''": "the path is empty",
    "serve ENGINES": "holds engines, and not a model repository",
    "serve GPU --port 0": "do not run here: they are for sm_10",
    "verify ONNX --against ENGINES": "the folders are swapped",
    "verify ENGINES --against ENGINES": "takes an fp32 export",
    "verify TINY": "no stage of ditforge wrote it",
    "verify REPO --against ONNX": "is a repository, which is not compared",
    "verify ENGINES --gpu cpu": "No such option: --gpu",
    "verify GPU_ENGINES --against ONNX": "cannot be executed: they are for sm_10",
    "verify STRANGE --against ONNX": "unknown compiler 'strange'",
    "bench GPU_ENGINES": "do not run here: they are for sm_10",
    "bench STRANGE": "unknown compiler 'strange'",
    "bench ENGINES --batch 0": "pictures at a time, not 0",
    "up CHECKPOINT --gpu rtx4090 --gpu-memory 0.7 --port 0 --cache c -q": "does not fit",
    "repo ONNX --out o": "is a folder of ONNX graphs, and a folder of engines is what this takes",
    "inspect nowhere": "does not exist",
}


def test_up_names_its_own_options(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also where a stage is refused the folder that it was given."""

    def refused(*arguments: object) -> None:
        raise UserError("no room", OTHER_OUT)

    monkeypatch.setattr("ditforge.export.onnx_export.export_checkpoint", refused)
    result = run_here(["up", str(paths["CHECKPOINT"]), "--port", "0", "--cache", "c"], monkeypatch, capfd)
    assert_error(result, "choose another --cache")


@pytest.mark.parametrize("case", CASES)
def test_fixes_are_commands_that_exist(
    case: str, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(paths.get(word, word)) for word in shlex.split(case)]
    result: Result = run_here(arguments, monkeypatch, capfd)
    assert_error(result, CASES[case])
    fix = result.err.rpartition("fix:   ")[2].strip()
    assert fix
    check(fix, arguments[0])
    assert not Path("o").exists()


def test_what_a_fix_must_not_be() -> None:
    for fix in ("ditforge verify DIR --gpu cpu", "--nosuch", "ditforge build X --nosuch 1   does it"):
        with pytest.raises((AssertionError, typer.BadParameter.__mro__[1])):
            check(fix, "verify")


def test_swapped_folders_are_verified_by_the_command_in_the_fix(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    swapped = ["verify", str(paths["ONNX"]), "--against", str(paths["ENGINES"])]
    fix = run_here(swapped, monkeypatch, capfd).err.rpartition("fix:   ")[2]
    (command,) = commands_in(fix)
    assert run_here(command, monkeypatch, capfd).code == 0


def test_a_read_only_disk_is_not_to_be_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadOnly:
        f_flag = os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly)
    with pytest.raises(UserError, match="read-only") as error:
        check_space(tmp_path / "onnx", 1)
    assert error.value.fix == "choose another out"


def test_a_repository_for_another_gpu_is_refused_before_triton_starts(paths: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="they are for sm_10, and this machine") as error:
        start(paths["GPU"], port=0)
    assert f"ditforge serve {paths['GPU']}   on a machine with sm_10" in error.value.fix
    assert "--gpu cpu" in error.value.fix


def test_how_a_service_ended() -> None:
    assert how_it_ended(-signal.SIGKILL) == "was killed (SIGKILL, perhaps for want of memory)"
    assert how_it_ended(-signal.SIGTERM) == "was killed (SIGTERM)"
    assert how_it_ended(3) == "ended with exit code 3"


def test_build_as_json(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build(paths["ONNX"], Path("made"))
    result = run_here(["build", str(paths["ONNX"]), "--out", "made", "--json"], monkeypatch, capfd)
    document = json.loads(result.out)
    assert (result.code, document["folder"], document["model"]) == (0, "made", "random-schnell")
    assert {engine["name"]: engine["kept"] for engine in document["engines"]} == dict.fromkeys(
        ("clip", "t5", "dit", "vae_decoder", "vae_encoder"), True
    )
    assert all(engine["size"] > 0 and engine["target"] == "cpu" for engine in document["engines"])
