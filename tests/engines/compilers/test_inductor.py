"""Builds by Inductor: several networks side by side, and how such a build ends before its time."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from command_line import PATIENCE, assert_error, ditforge, eventually, popen
from exports import alone

from ditforge import manifest
from ditforge.engines.build import BuildOptions, build
from ditforge.engines.compilers.inductor_engine import PACKAGE
from ditforge.engines.verify import compare
from ditforge.errors import UserError

ARGUMENTS = ("--gpu", "cpu", "--compiler", "inductor", "--static", "64x48", "--batch", "1", "--out", "engines")
OPTIONS = BuildOptions(gpu="cpu", compiler="inductor", static="64x48", batch=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package was compiled before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def dit(schnell, tmp_path: Path) -> Path:
    return alone(schnell.onnx, tmp_path / "onnx")


def forks(pid: int) -> Iterator[psutil.Process]:
    """The processes in which the build with this process's number compiles."""
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            yield from child.children()


def compiles(pid: int) -> bool:
    """Whether a C++ compiler runs for a package."""
    return any(name_of(process).startswith("cc1plus") for process in descendants(pid))


def name_of(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:  # it has ended meanwhile
        return ""


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def has_ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_all_that_compile_end_with_the_build(dit: Path, tmp_path: Path, number: int) -> None:
    """The forks, and the C++ compilers that they started."""
    with popen("build", dit, *ARGUMENTS, cwd=tmp_path) as process:
        eventually(lambda: compiles(process.pid))
        started = descendants(process.pid)
        process.send_signal(number)
        process.wait(PATIENCE)
    eventually(lambda: all(map(has_ended, started)))
    codes = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == codes[signal.Signals(number)]
    if number != signal.SIGKILL:
        assert {path.name for path in tmp_path.iterdir()} <= {"onnx", "cache"}


@pytest.mark.parametrize("victim", ["a package's", "the one of all"])
def test_a_process_that_is_killed(dit: Path, tmp_path: Path, victim: str) -> None:
    """As the system does when memory runs out."""
    with popen("build", dit, *ARGUMENTS, cwd=tmp_path) as process:
        eventually(lambda: compiles(process.pid))
        started = descendants(process.pid)
        pids = [fork.pid for fork in forks(process.pid)] if victim == "a package's" else [started[0].pid]
        os.kill(pids[0], signal.SIGKILL)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "error: the compiler was killed by SIGKILL while it compiled dit" in said
    eventually(lambda: all(map(has_ended, started)))
    assert {path.name for path in tmp_path.iterdir()} <= {"onnx", "cache"}


def test_a_build_prints_no_warnings_of_libraries(dit: Path, tmp_path: Path) -> None:
    done = ditforge("build", dit, *ARGUMENTS, "--verbose", cwd=tmp_path)
    assert done.code == 0, done.err
    own = re.compile(r"\[build\] |\d\d:\d\d:\d\d (INFO|DEBUG) ditforge\.")
    assert [line for line in done.err.splitlines() if not own.match(line)] == []


def test_no_build_begins_without_a_folder_for_temporary_files(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    refused = ditforge("build", dit, *ARGUMENTS, cwd=tmp_path)
    assert_error(refused, tmp_path / "missing", "which TMPDIR names: No such file or directory", "TMPDIR=FOLDER")


def test_networks_are_compiled_side_by_side(schnell, tmp_path: Path) -> None:
    """All of them come out as the same networks, and progress is that of all."""
    said: list[tuple[str, int, int]] = []
    networks = {"clip", "t5"}
    onnx = alone(schnell.onnx, tmp_path / "onnx", *networks)
    made = build(onnx, tmp_path / "engines", OPTIONS, lambda *step: said.append(step)).manifest
    *steps, last = said
    assert last == ("done", 2, 2)
    assert {doing.split(":")[0] for doing, _, _ in steps} == networks
    assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
    packages = [name for one in made.components.values() for name in one.files if name.endswith(PACKAGE)]
    assert steps[-1][1:] == (len(networks) + len(packages),) * 2
    assert manifest.is_whole(tmp_path / "engines", made.components)
    differences = compare(tmp_path / "engines", schnell.onnx)
    assert {one.component for one in differences} == networks
    assert max(one.relative for one in differences) < 1e-3


def test_a_network_that_cannot_be_compiled_ends_the_build(schnell, tmp_path: Path) -> None:
    onnx = alone(schnell.onnx, tmp_path / "onnx", "dit", "t5")
    damaged = onnx / "t5.programs"
    damaged.write_bytes(b"no archive")
    found = manifest.read(onnx, "onnx")
    t5 = found.components["t5"]
    t5 = t5.model_copy(update={"files": {**t5.files, damaged.name: manifest.describe(damaged)}})
    manifest.write(found.model_copy(update={"components": {**found.components, "t5": t5}}), onnx)
    with pytest.raises(UserError, match=r"t5\.programs is damaged"):
        build(onnx, tmp_path / "engines", OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} <= {"onnx", "cache"}
