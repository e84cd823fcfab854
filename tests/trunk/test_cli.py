"""The command line: help, versions, what it prints and writes, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from command_line import (
    BAR,
    FEW,
    HEED_INTERRUPTS,
    PATIENCE,
    Result,
    calls,
    ditforge,
    eventually,
    popen,
    settled_calls,
    tree,
)
from pictures import LAST_BIT, largest_difference
from PIL import Image
from python_models import ADD_ONE, write_models

from ditforge import __version__, install_hint
from ditforge.client import Client
from ditforge.client.picture_file import read_parameters
from ditforge.commands import ORDER, commands, up
from ditforge.engines import build as building
from ditforge.export import onnx_export
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.triton_repo.server import Server
from ditforge.triton_repo.tritonserver import SHM

COMMANDS = [command.__name__ for command in commands()]
HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "grpc", "tritonclient", "diffusers", "transformers", "PIL"}


def test_help_names_every_command(tmp_path: Path) -> None:
    for arguments, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        result = ditforge(*arguments, cwd=tmp_path)
        assert result.code == code
        assert all(f"\n  {command} " in result.out for command in COMMANDS)
        assert "..." not in result.out.partition("Commands:")[2]  # their first sentences fit into a line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, tmp_path: Path) -> None:
    result = ditforge(command, "--help", cwd=tmp_path)
    assert result.code == 0
    assert f"Example: ditforge {command}" in result.out
    assert result.err == ""


def test_the_commands_of_old_are_all_there() -> None:
    assert COMMANDS[: len(ORDER)] == ORDER


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
    assert fix == f"fix:   {install_hint.install(extra)}"
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("arguments", [["gpus"], ["plan", "ONNX", "--gpu", "rtx3060"]])
def test_what_the_client_alone_suffices_for(arguments: list[str], schnell, tmp_path: Path) -> None:
    arguments = [str(schnell.onnx) if argument == "ONNX" else argument for argument in arguments]
    absent = [module for extra, modules in install_hint.EXTRAS.items() if extra != "client" for module in modules]
    program = f"import sys; sys.modules |= dict.fromkeys({sorted({*absent} - {'google'})}); sys.argv[0] = 'ditforge'\n"
    program += "from ditforge.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_generate_and_inspect(schnell_server: Server, tmp_path: Path) -> None:
    options = ("--url", schnell_server.url, "--seed", "5", "--steps", "2", "--height", "32")
    result = ditforge("generate", "a red circle", *options, cwd=tmp_path)
    assert (result.code, result.out) == (0, "picture-5.png\n")
    assert "2 of 2" in result.err  # the progress
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
    assert (running.returncode, out, err) == (0, "stopping\nstopped\n", "")
    assert owned(server) == []
    assert processes(server) == []
    assert os.listdir(tmp_path) == ["server.log"]


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGTERM, 143, ""), (signal.SIGINT, 130, "interrupted\n")])
def test_a_signal_before_the_server_is_ready(number: signal.Signals, code: int, said: str, tmp_path: Path) -> None:
    slow = ADD_ONE + "    def initialize(self, args):\n        import time; time.sleep(600)\n"
    running = popen("serve", write_models(tmp_path / "repo", slow=slow), "--port", "0", "--log", "log", cwd=tmp_path)
    servers: list[psutil.Process] = []

    def starting() -> bool:
        servers[:] = psutil.Process(running.pid).children()
        return any(b"model.py" in line.encode() for server in servers for line in processes(server.pid))

    try:
        eventually(starting)
        running.send_signal(number)
        out, err = running.communicate(timeout=PATIENCE)
    finally:
        running.kill()
    assert (running.returncode, out, err) == (code, "", said)
    assert [owned(server.pid) for server in servers] == [[]]
    eventually(lambda: not processes(servers[0].pid))  # those that were killed take a moment to die


SERVICE = """#!{python}
import json, sys
for event in {before}:
    print(json.dumps(event), flush=True)
sys.stdin.readline()  # stop SECONDS
print(json.dumps({{"event": "draining", "message": "stopping: some unfinished pictures"}}), flush=True)
if {waits}:
    sys.stdin.read()  # until its end: at once
for event in {after}:
    print(json.dumps(event), flush=True)
"""
READY = [{"event": "listening", "port": 1, "metrics_port": None}, {"event": "ready"}]
DIED = [{"event": "died", "message": "tritonserver has died"}, {"event": "ready"}]
SERVE = "import sys; sys.executable = sys.argv.pop(1); from ditforge.cli import main; main()"


@pytest.fixture
def serve_until_signal(tmp_path: Path) -> Callable[..., Result]:
    """Runs `ditforge serve OPTIONS` with a made-up service in place of ours, and ends it by so many signals."""

    def run(*options: str, died: bool = False, unfinished: int | None = None, signals: int = 1) -> Result:
        before = READY + (DIED if died else [])
        after = [] if unfinished is None else [{"event": "stopped", "unfinished": unfinished, "cause": ""}]
        service = tmp_path / "service"
        service.write_text(SERVICE.format(python=sys.executable, before=before, waits=signals > 1, after=after))
        service.chmod(0o755)
        repository = tmp_path / "repo"
        if not repository.exists():
            write_models(repository, add=ADD_ONE)
        command = [*HEED_INTERRUPTS, sys.executable, "-c", SERVE, service, "serve", repository, "--port", "0", *options]
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)  # type: ignore[call-overload]
        try:
            while not running.stdout.readline().startswith("serving "):
                assert running.poll() is None
            for _ in range(signals - 1):
                running.send_signal(signal.SIGINT)
                while "stopping" not in running.stdout.readline():
                    assert running.poll() is None
            running.send_signal(signal.SIGINT)
            out, err = running.communicate(timeout=PATIENCE)
        finally:
            running.kill()
        return Result(running.returncode, out, err)

    return run


def logs(folder: Path) -> list[Path]:
    """The temporary logs of servers."""
    return list(folder.glob("ditforge-serve-*/*"))


@pytest.mark.parametrize("unfinished", [None, 0])
def test_a_clean_stop_leaves_nothing(serve_until_signal, tmp_path: Path, unfinished: int | None) -> None:
    result = serve_until_signal(unfinished=unfinished)
    assert (result.code, result.out, result.err) == (0, "stopping: some unfinished pictures\nstopped\n", "")
    assert list(tmp_path.glob("ditforge-serve-*")) == []
    assert serve_until_signal("--log", "mine").code == 0
    assert (tmp_path / "mine").exists()


def test_pictures_that_were_cut_off(serve_until_signal, tmp_path: Path) -> None:
    result = serve_until_signal("--grace", "45", unfinished=2)
    (log,) = logs(tmp_path)
    assert result.code == 1
    problem, fix = result.err.splitlines()
    assert problem == f"error: 2 pictures were not finished within --grace 45 seconds, and cut off (log: {log})"
    assert fix.startswith("fix:   --grace 90; ")
    assert "stopped" not in result.out


def test_a_second_signal_cuts_off(serve_until_signal, tmp_path: Path) -> None:
    result = serve_until_signal(unfinished=1, signals=2)
    assert result.code == 1
    assert result.err.startswith("error: 1 picture was not finished: the server was told to stop at once\nfix:   ")
    assert len(logs(tmp_path)) == 1
    assert serve_until_signal(unfinished=0, signals=2) == Result(0, "stopped\n", "")


def test_the_log_of_a_server_of_which_something_died_stays(serve_until_signal, tmp_path: Path) -> None:
    result = serve_until_signal(died=True)
    (log,) = logs(tmp_path)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1] == f"stopped; the log is {log}"


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
    cache, source = tmp_path / "cache", CheckpointSource(schnell.checkpoint)
    with monkeypatch.context() as first:
        first.setattr(onnx_export, "export_checkpoint", lambda _, out, *__, **___: shutil.copytree(schnell.onnx, out))
        repository = up.prepare(up.Wanted(source, precision="fp32", max_batch=4), cache)
    assert capsys.readouterr().out == f"wrote {repository}\n"
    assert up.prepare(up.Wanted(source, precision="fp32", max_batch=8), cache) == repository
    assert (
        capsys.readouterr().out
        == f"wrote {repository}: max_batch was 4, is 8; a server that runs on it has to be started again\n"
    )
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
    said = [line for line in err.splitlines() if not BAR.search(line)]
    assert (running.returncode, said) == (0, [])
    assert {path: when for path, when in tree(cache).items() if "__pycache__" not in path} == before  # of the server


def test_build_says_why(schnell, tmp_path: Path) -> None:
    shutil.copytree(schnell.engines, tmp_path / "engines")
    assert "up to date" in ditforge("build", schnell.onnx, "--out", "engines", cwd=tmp_path).out
    (tmp_path / "engines" / "clip.onnx").write_bytes(b"")
    result = ditforge("build", schnell.onnx, "--out", "engines", cwd=tmp_path)
    assert (result.code, result.out) == (0, "built clip: clip.onnx is missing or truncated\ndit is fp32, for cpu\n")
    assert building.build(schnell.onnx, tmp_path / "engines").rebuilt == {}


def test_repo_says_why(schnell, tmp_path: Path) -> None:
    shutil.copytree(schnell.repository, tmp_path / "repo")
    written = "wrote repo: max_batch was 8, is 2; a server that runs on it has to be started again"
    for options, said in (((), "repo is up to date"), (("--max-batch", "2"), written)):
        result = ditforge("repo", schnell.engines, "--out", "repo", *options, cwd=tmp_path)
        assert (result.code, result.out) == (0, f"{said}\n")


def test_nothing_is_noted_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's telemetry would write what it does into the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = "import ditforge, onnxruntime; print(onnxruntime.get_available_providers())"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "CPUExecutionProvider" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_broken_command_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "helper.py").write_text("")
    program = "import ditforge.commands as c; c.__path__.append('.'); from ditforge import cli; cli.main()"
    command = [sys.executable, "-c", program, "gpus", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and json.loads(done.stdout)["gpus"]
    first, second = done.stderr.splitlines()
    assert first.startswith("warning: there is no command broken: ModuleNotFoundError")
    assert second.startswith("warning: there is no command helper: AttributeError")
