"""Memory that is given in parts: none overlaps another, and what was given back is given again."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from ditforge.shared_memory import ALIGNMENT, SPARED
from ditforge.triton_repo.arena import Arena


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_parts_never_overlap(sizes: list[int], random) -> None:
    arena, there = Arena(1024), dict[int, int]()
    for size in sizes:
        start = arena.take(size)
        if start is None:
            gaps = sorted([(0, 0), *((begin, begin + length) for begin, length in there.items()), (1024, 1024)])
            needed = -(-size // ALIGNMENT) * ALIGNMENT
            assert all(after - before < needed for (_, before), (after, _) in pairwise(gaps))
        else:
            assert start + size <= 1024 and not start % ALIGNMENT
            assert all(start + size <= begin or begin + length <= start for begin, length in there.items())
            there[start] = -(-size // ALIGNMENT) * ALIGNMENT
        if there and random.random() < 0.4:
            gone = random.choice(sorted(there))
            arena.free(gone)
            del there[gone]
    assert arena.used == sorted((begin, begin + length) for begin, length in there.items())


def test_its_file_is_this_user_s_and_takes_no_room_before_it_is_used(tmp_path: Path) -> None:
    file = tmp_path / "arena"
    arena = Arena(1 << 20, file)
    assert (file.stat().st_size, file.stat().st_blocks, file.stat().st_mode & 0o777) == (1 << 20, 0, 0o600)
    start = arena.take(100)
    assert start is not None
    arena.memory[start : start + 3] = b"abc"
    assert file.read_bytes()[start : start + 3] == b"abc"


def test_what_triton_needs_is_spared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where little is free, no more is taken. What has memory already is given again all the same."""
    arena = Arena(1 << 20, tmp_path / "arena")
    start = arena.take(1000)
    assert start is not None and arena.backed == 1024
    found = os.statvfs(tmp_path)
    scarce = os.statvfs_result([*found[:3], *[SPARED // found.f_frsize] * 2, *found[5:]])
    monkeypatch.setattr(os, "fstatvfs", lambda descriptor: scarce)
    assert arena.take(10) is None
    arena.free(start)
    assert arena.take(1024) == start
