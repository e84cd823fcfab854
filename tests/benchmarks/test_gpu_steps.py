"""In which order gpu_steps.py measures."""

from __future__ import annotations

import sys

import pytest
from gpu_step_engines import Shape
from gpu_steps import ENGINES, Wanted, order, parse


def groups(monkeypatch: pytest.MonkeyPatch, *given: str) -> list[tuple[str, list[Wanted]]]:
    monkeypatch.setattr(sys, "argv", ["gpu_steps.py", "flux.1-dev", *given])
    return [(name, list(wanted)) for name, wanted in order(parse())]


def test_the_bars_come_first_then_sizes_then_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = groups(monkeypatch)
    first = [(Shape(1024, 1), False), (Shape(512, 1), False)]
    assert [wanted for _, wanted in found[:5]] == [first] * 5
    assert found[4][0] == found[5][0] == "inductor fp8"  # which stays open
    assert all(shape.batch == 1 for _, wanted in found[5:10] for shape, _ in wanted)
    assert all(shape.batch > 1 for _, wanted in found[10:] for shape, _ in wanted)


def test_every_engine_is_measured_once_at_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(name, *one) for name, wanted in groups(monkeypatch, "--engines", ",".join(ENGINES)) for one in wanted]
    assert len(rows) == len(set(rows))
    shapes = {Shape(side, batch) for side in (512, 768, 1024, 1536) for batch in (1, 2, 4, 8)}
    for name in ENGINES:
        assert {shape for engine, shape, _ in rows if engine == name} == shapes


def test_without_a_compilation_for_all_only_the_named_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    given = groups(monkeypatch, "--no-all", "--static", "768x4", "--engines", "inductor fp8")
    assert [one for _, wanted in given for one in wanted] == [(Shape(768, 4), False)]
