"""Tasks in forks: what they return and add, how many at a time, and how they end. None of them compiles anything."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import eventually

from ditforge import machine_processors
from ditforge.engines.compilers import side_by_side
from ditforge.engines.compilers.side_by_side import Add, Task, how_many, run
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.machine_memory import Memory
from ditforge.verbosity import LOGGER

LONG = 600  # seconds; whoever waits for it was not ended


def written(folder: Path, name: str, seconds: float, *, add: Add) -> str:
    """Write when it began and ended into the file `name`."""
    del add
    begun = time.monotonic()
    (folder / f"{name}.begun").write_text(str(os.getpid()))
    time.sleep(seconds)
    (folder / name).write_text(f"{begun} {time.monotonic()}")
    return name


def with_more(folder: Path, name: str, names: list[str], most: int | None, *, add: Add) -> str:
    add([task(folder, one, 0.3, size) for size, one in enumerate(names)], most)
    return name


def failing(error: Exception, *, add: Add) -> None:
    del add
    raise error


def killed(number: int, *, add: Add) -> None:
    del add
    os.kill(os.getpid(), number)


def task(folder: Path, name: str, seconds: float = 0.0, size: int = 0) -> Task:
    return Task("dit", name, written, (folder, name, seconds), size)


def silent(doing: str, done: int, total: int) -> None:
    del doing, done, total


def most_at_once(folder: Path) -> int:
    """How many of the tasks ran at the same time."""
    spans = [tuple(map(float, path.read_text().split())) for path in folder.iterdir() if not path.suffix]
    return max(sum(begun <= at < ended for begun, ended in spans) for at, _ in spans)


def test_results_are_in_the_order_of_the_tasks(tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    tasks = [task(tmp_path, "a", 0.2), task(tmp_path, "b"), task(tmp_path, "c", size=5)]
    assert run(tasks, 3, lambda *step: said.append(step)) == ["a", "b", "c"]
    assert said[0] == ("c", 0, 3), "the largest is begun first"
    assert said[-1][1:] == (3, 3)
    assert os.getpid() not in {int(path.read_text()) for path in tmp_path.glob("*.begun")}


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_no_more_are_done_at_a_time(tmp_path: Path, at_once: int) -> None:
    run([task(tmp_path, name, 0.3) for name in "abcdef"], at_once, silent)
    assert most_at_once(tmp_path) == at_once


def test_tasks_that_make_the_same_are_done_one_after_the_other(tmp_path: Path) -> None:
    """Others are done beside them, and all are done."""
    for folder, makes in (("equal", ["x", "x", "x"]), ("mixed", ["x", "x", ""]), ("none", ["", "", ""])):
        (tmp_path / folder).mkdir()
        tasks = [
            replace(task(tmp_path / folder, name, 0.4), makes=made) for name, made in zip("abc", makes, strict=True)
        ]
        assert run(tasks, 3, silent) == ["a", "b", "c"]
    assert [most_at_once(tmp_path / folder) for folder in ("equal", "mixed", "none")] == [1, 2, 3]


@pytest.mark.parametrize(("most", "expected"), [(None, 3), (2, 2), (0, 1)])
def test_tasks_add_tasks_and_say_how_many_at_a_time(tmp_path: Path, most: int | None, expected: int) -> None:
    said: list[tuple[str, int, int]] = []
    first = Task("dit", "plan", with_more, (tmp_path, "plan", ["a", "b", "c"], most), 0)
    assert run([first], 3, lambda *step: said.append(step)) == ["plan"]
    assert said[-1][1:] == (4, 4)
    assert most_at_once(tmp_path) == expected
    begun = [doing for doing, _, _ in said]
    assert begun.index("c") < begun.index("b") < begun.index("a"), "the largest is begun first"


def warning(category: type[Warning], *, add: Add) -> None:
    del add
    warnings.warn(f"a {category.__name__}", category, stacklevel=2)


def test_warnings_for_users_are_told_and_those_of_libraries_are_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(LOGGER), "handlers", [])  # that of a command, which tests may have run here
    kinds = FutureWarning, DitforgeWarning, UserWarning
    tasks = [Task("dit", kind.__name__, warning, (kind,), 0) for kind in kinds]
    with pytest.warns() as given:
        run(tasks, 1, silent)
    assert [(one.category, str(one.message)) for one in given] == [(DitforgeWarning, "a DitforgeWarning")]
    assert capfd.readouterr().err == "" and not caplog.text
    with caplog.at_level("INFO", "ditforge"), pytest.warns(DitforgeWarning):
        run(tasks, 1, silent)
    assert sorted(caplog.messages) == ["FutureWarning: a FutureWarning", "UserWarning: a UserWarning"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (Task("t5", "", failing, (UserError("no", "do it"),), 0), "no"),
        (Task("t5", "", failing, (ValueError("a fault of ours"),), 0), "gone with exit code 1 while it compiled t5"),
        (Task("t5", "", killed, (signal.SIGKILL,), 0), "killed by SIGKILL while it compiled t5"),
        (Task("t5", "", killed, (signal.SIGTERM,), 0), "killed by SIGTERM while it compiled t5"),
    ],
)
def test_one_that_fails_ends_the_others(tmp_path: Path, last: Task, message: str) -> None:
    tasks = [task(tmp_path, "long", LONG, size=1), last, task(tmp_path, "never", size=-1)]
    begun = time.monotonic()
    with pytest.raises(DitforgeError, match=message) as error:
        run(tasks, 2, silent)
    assert error.value.fix
    assert time.monotonic() - begun < LONG / 2
    assert not list(tmp_path.glob("never*"))
    for path in tmp_path.glob("*.begun"):
        assert not Path(f"/proc/{path.read_text()}").exists()


SCHEDULER = """
import sys, time
from ditforge.engines.compilers.side_by_side import Task, run

def wait(name, *, add):
    open(name, "w").close()
    time.sleep(600)

run([Task("dit", name, wait, (name,), 0) for name in sys.argv[1:]], 3, print)
"""


def test_tasks_end_with_the_process_that_schedules_them(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in "abc"]
    with subprocess.Popen([sys.executable, "-c", SCHEDULER, *names], stdout=subprocess.DEVNULL) as process:
        eventually(lambda: len(list(tmp_path.iterdir())) == len(names))
        tasks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert len(tasks) == len(names)
    eventually(lambda: not any(running(pid) for pid in tasks))


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_how_many_are_done_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(processors: int, gib: float) -> int:
        monkeypatch.setattr(machine_processors.os, "sched_getaffinity", lambda _: set(range(processors)))
        available = int(gib * 2**30)
        monkeypatch.setattr(side_by_side, "read_memory", lambda: Memory(available, available))
        return how_many()

    monkeypatch.setattr(machine_processors, "groups", lambda: iter(()))
    assert machine(processors=16, gib=126) == 16
    assert machine(processors=16, gib=16.5) == 8
    assert machine(processors=2, gib=126) == 2
    assert machine(processors=16, gib=0.5) == 1
