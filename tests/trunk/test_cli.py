"""The command line: help, versions, what it prints and writes, and how it ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from command_line import BAR, FEW, PATIENCE, calls, ditforge, eventually, popen, settled_calls, tree
from pictures import LAST_BIT, largest_difference
from PIL import Image

from ditforge import __version__, serving
from ditforge.client import Client
from ditforge.client.picture import read_parameters
from ditforge.engines import build as building
from ditforge.export import onnx_export
from ditforge.triton_repo.server import Server
from ditforge.triton_repo.tritonserver import SHM

COMMANDS = [
    "export",
    "calibrate",
    "build",
    "plan",
    "verify",
    "repo",
    "serve",
    "generate",
    "up",
    "gpus",
    "doctor",
    "inspect",
]
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "grpc", "tritonclient", "diffusers", "transformers", "PIL"}


def test_help_names_every_command(tmp_path: Path) -> None:
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        result = ditforge(*arguments, cwd=tmp_path)
        assert result.code == code
        assert all(f"\n  {command} " in result.out for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, tmp_path: Path) -> None:
    result = ditforge(command, "--help", cwd=tmp_path)
    assert result.code == 0
    assert f"Example: ditforge {command}" in result.out
    assert result.err == ""


def test_every_command_is_tested() -> None:
    from ditforge.cli import app

    assert [command.callback.__name__ for command in app.registered_commands if command.callback] == COMMANDS


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """So that it answers at once; how fast depends on the machine."""
    command = [sys.executable, "-X", "importtime", "-m", "ditforge", "--help"]
    imported = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stderr
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in imported.splitlines()}
    assert "typer" in modules
    assert not modules & HEAVY


def test_version(tmp_path: Path) -> None:
    assert ditforge("--version", cwd=tmp_path).out == f"ditforge {__version__}\n"


@pytest.mark.parametrize("arguments", [["nosuch"], ["generate"], ["generate", "a", "--nosuch"], ["build", "onnx"]])
def test_wrong_arguments(arguments: list[str], tmp_path: Path) -> None:
    result = ditforge(*arguments, cwd=tmp_path)
    assert result.code == 2
    problem, fix = result.err.splitlines()
    assert problem.startswith("error: ")
    assert fix.startswith("fix:   ")
    assert fix.endswith(" --help")


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("torch", "export", ["export", "checkpoint", "--out", "onnx"]),
        ("tritonclient", "client", ["generate", "a"]),
        ("PIL", "client", ["generate", "a"]),
        ("numpy", "client", ["generate", "a"]),
        ("onnxruntime", "engines", ["build", "ENGINES", "--out", "engines"]),
    ],
)
def test_missing_extra(module: str, extra: str, arguments: list[str], schnell, tmp_path: Path) -> None:
    arguments = [str(schnell.onnx) if argument == "ENGINES" else argument for argument in arguments]
    program = f"import sys; sys.modules[{module!r}] = None; sys.argv[0] = 'ditforge'\n"
    program += "from ditforge.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    problem, fix = (line for line in done.stderr.splitlines() if not BAR.search(line))
    assert problem == f"error: this command needs {module}, which is not installed"
    assert fix == f"fix:   pip install 'ditforge[{extra}]'"
    assert os.listdir(tmp_path) == []


def test_doctor(tmp_path: Path) -> None:
    result = ditforge("doctor", cwd=tmp_path)
    assert result.code == 0
    assert all(word in result.out for word in ("python", "tritonserver", "[client]", "torch"))


def test_generate_and_inspect(schnell_server: Server, tmp_path: Path) -> None:
    options = ("--url", schnell_server.url, "--seed", "5", "--steps", "2", "--height", "32")
    result = ditforge("generate", "a red circle", *options, cwd=tmp_path)
    assert (result.code, result.out) == (0, "picture-5.png\n")
    assert "2/2" in result.err  # the progress bar
    with Image.open(tmp_path / "picture-5.png") as image:
        assert image.size == (96, 32)
    shown = ditforge("inspect", "picture-5.png", cwd=tmp_path).out
    for row in (["prompt", "a red circle"], ["seed", "5"], ["steps", "2"], ["height", "32"], ["sampler", "euler"]):
        assert any(line.split(maxsplit=1) == row for line in map(str.strip, shown.splitlines())), shown


def test_generate_several(schnell_server: Server, tmp_path: Path) -> None:
    options = ("--url", schnell_server.url, "--steps", "1", "--count", "2", "--seed", "7")
    assert ditforge("generate", "a", *options, cwd=tmp_path).out.split() == ["picture-7.png", "picture-8.png"]
    assert ditforge("generate", "a", *options, "--out", "x.png", cwd=tmp_path).out.split() == ["x-0.png", "x-1.png"]
    assert sorted(os.listdir(tmp_path)) == ["picture-7.png", "picture-8.png", "x-0.png", "x-1.png"]
    assert read_parameters(tmp_path / "x-1.png") == read_parameters(tmp_path / "picture-8.png")
    one, same, other = (Image.open(tmp_path / name) for name in ("x-1.png", "picture-8.png", "x-0.png"))
    with one, same, other:
        assert largest_difference(one, same) <= LAST_BIT < largest_difference(one, other)


def test_inspect_a_folder(schnell, tmp_path: Path) -> None:
    for folder, kind in ((schnell.onnx, "onnx"), (schnell.engines, "engines"), (schnell.repository, "repository")):
        result = ditforge("inspect", folder, cwd=tmp_path)
        assert result.code == 0
        assert f"{kind} of random-schnell" in result.out
        assert all(name in result.out for name in ("tokenizer", "clip", "t5", "dit", "vae_decoder", "velocity"))


def test_ctrl_c_ends_generate(schnell_server: Server, tmp_path: Path) -> None:
    url = schnell_server.url
    before = calls(url)
    options = ("--url", url, "--steps", "1000", "--height", "384", "--width", "384", "--out", "picture.png")
    running = popen("generate", "a", *options, cwd=tmp_path)
    try:
        eventually(lambda: calls(url) > before + 3)
        at_interrupt = calls(url)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
    assert (running.returncode, out) == (130, "")
    assert settled_calls(url) - at_interrupt <= FEW  # of a thousand steps
    assert "Traceback" not in err
    assert err.endswith("interrupted\n")
    assert os.listdir(tmp_path) == []


def test_serve_until_sigterm(schnell, tmp_path: Path) -> None:
    running = popen("serve", schnell.repository, "--port", "0", "--log", "server.log", cwd=tmp_path)
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line.startswith(f"serving {schnell.repository} at 127.0.0.1:"), line
        with Client(line.split(" at ")[1].split()[0]) as client:
            client.generate("a", steps=1)
        (server,) = [child.pid for child in psutil.Process(running.pid).children()]
        assert owned(server)
        running.terminate()
        out, err = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
    assert (running.returncode, out, err) == (0, "stopped\n", "")
    assert owned(server) == []
    assert processes(server) == []
    assert os.listdir(tmp_path) == ["server.log"]


def owned(pid: int) -> list[Path]:
    """What the server in this process has in shared memory."""
    return [path for path in SHM.iterdir() if f"-{pid}-" in path.name]


def processes(pid: int) -> list[str]:
    """The command lines of the Triton that this process watches over, and of its models."""
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if f"-{pid}-" in line]


def test_up_keeps_what_is_there(
    schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first time is prepared in this process, with the session's export in place of another one."""
    cache = tmp_path / "cache"
    with monkeypatch.context() as first:
        first.setattr(onnx_export, "export_checkpoint", lambda _, out, *__, **___: shutil.copytree(schnell.onnx, out))
        repository = serving.prepare(schnell.checkpoint, "cpu", "fp32", 4, cache)
    assert capsys.readouterr().out == f"wrote {repository}: there is no repository yet\n"
    assert serving.prepare(schnell.checkpoint, "cpu", "fp32", 8, cache) == repository
    assert capsys.readouterr().out == f"wrote {repository}: max_batch was 4, is 8\n"
    before = tree(cache)
    running = popen("up", schnell.checkpoint, "--cache", cache, "--port", "0", "--log", "log", cwd=tmp_path)
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == f"{repository} is up to date\n"
        line = running.stdout.readline()
        assert line.startswith(f"serving {repository} at "), line
        with Client(line.split(" at ")[1].split()[0]) as client:
            client.generate("a", steps=1)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
    assert (running.returncode, err) == (0, "")
    assert {path: when for path, when in tree(cache).items() if "__pycache__" not in path} == before  # of the server


def test_build_says_why(schnell, tmp_path: Path) -> None:
    shutil.copytree(schnell.engines, tmp_path / "engines")
    assert "up to date" in ditforge("build", schnell.onnx, "--out", "engines", cwd=tmp_path).out
    (tmp_path / "engines" / "clip.onnx").write_bytes(b"")
    result = ditforge("build", schnell.onnx, "--out", "engines", cwd=tmp_path)
    assert (result.code, result.out) == (0, "built clip: clip.onnx is missing or truncated\n")
    assert building.build(schnell.onnx, tmp_path / "engines", "cpu").rebuilt == {}


def test_repo_says_why(schnell, tmp_path: Path) -> None:
    shutil.copytree(schnell.repository, tmp_path / "repo")
    for options, said in (((), "repo is up to date"), (("--max-batch", "2"), "wrote repo: max_batch was 8, is 2")):
        result = ditforge("repo", schnell.engines, "--out", "repo", *options, cwd=tmp_path)
        assert (result.code, result.out) == (0, f"{said}\n")
