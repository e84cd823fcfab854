"""Memory as the kernel tells it, from files like those of a machine and of containers."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ditforge import machine_memory
from ditforge.machine_memory import Memory, read_memory

GB = 10**9


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GB, of which 40 are available, without control groups."""
    monkeypatch.setattr(machine_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine_memory, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc" / "meminfo", "MemTotal: 62500000 kB\nMemFree: 1 kB\nMemAvailable: 39062500 kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2(folder: Path, limit: str, used: int, inactive: int = 0) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 1\ninactive_file {inactive}\n")


def test_this_machine() -> None:
    found = read_memory()
    assert found is not None
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available <= found.total
    assert found.limit is None or found.limit < found.total


def test_a_machine_without_groups(machine: Path) -> None:
    assert read_memory() == Memory(64 * GB, 40 * GB)
    (machine / "proc" / "meminfo").write_text("nothing")
    assert read_memory() is None


def test_the_processs_own_group_and_not_the_root_s(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/user.slice/app.scope\n")
    v2(machine / "cgroup", "max", 30 * GB)
    v2(machine / "cgroup" / "user.slice", "max", 20 * GB)
    assert read_memory() == Memory(64 * GB, 40 * GB)
    v2(machine / "cgroup" / "user.slice" / "app.scope", str(8 * GB), 5 * GB, 1 * GB)
    assert read_memory() == Memory(64 * GB, 4 * GB, 8 * GB)
    v2(machine / "cgroup" / "user.slice", str(6 * GB), 5 * GB)  # a parent's limit holds as well
    assert read_memory() == Memory(64 * GB, 1 * GB, 6 * GB)


def test_a_container_that_sees_its_own_group_as_the_root(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "0::/\n")
    v2(machine / "cgroup", str(2 * GB), 1 * GB)
    assert read_memory() == Memory(64 * GB, 1 * GB, 2 * GB)
    write(machine / "proc" / "self" / "cgroup", "0::/docker/1234\n")  # the host's name for it
    assert read_memory() == Memory(64 * GB, 1 * GB, 2 * GB)


def test_version_1(machine: Path) -> None:
    write(machine / "proc" / "self" / "cgroup", "5:cpu,cpuacct:/\n4:memory:/docker/1234\n0::/\n")
    folder = machine / "cgroup" / "memory" / "docker" / "1234"
    write(folder / "memory.limit_in_bytes", str(16 * GB))
    write(folder / "memory.usage_in_bytes", str(10 * GB))
    write(folder / "memory.stat", f"cache 1\ntotal_inactive_file {3 * GB}\n")
    assert read_memory() == Memory(64 * GB, 9 * GB, 16 * GB)
    write(folder / "memory.limit_in_bytes", "9223372036854771712")  # which is how version 1 says that there is none
    assert read_memory() == Memory(64 * GB, 40 * GB)
