"""Processors as the kernel counts them, and as control groups limit them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ditforge import machine_memory
from ditforge.machine_processors import count_processors


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's control group, in the place of the kernel's."""
    monkeypatch.setattr(machine_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine_memory, "CGROUPS", tmp_path / "cgroup")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "self" / "cgroup").write_text("0::/box/inner\n")
    inner = tmp_path / "cgroup" / "box" / "inner"
    inner.mkdir(parents=True)
    return inner


def test_affinity() -> None:
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        assert count_processors() <= 1
    finally:
        os.sched_setaffinity(0, mine)
    assert 0 < count_processors() <= len(mine)


@pytest.mark.parametrize(
    ("own", "above", "expected"),
    [
        ("max 100000", "max 100000", None),
        ("50000 100000", "max 100000", 0.5),
        ("max 100000", "25000 100000", 0.25),
        ("900000 100000", "75000 100000", 0.75),
        ("nonsense", "", None),
    ],
)
def test_the_lowest_limit_of_the_group_and_its_parents(
    group: Path, own: str, above: str, expected: float | None
) -> None:
    (group / "cpu.max").write_text(f"{own}\n")
    (group.parent / "cpu.max").write_text(f"{above}\n")
    assert count_processors() == (len(os.sched_getaffinity(0)) if expected is None else expected)
