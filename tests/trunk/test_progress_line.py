"""How far something is, in words: an estimate is there only once it means something, and is then right."""

from __future__ import annotations

import pytest

from ditforge.progress_line import Pace, Unit, duration


class Clock:
    """Seconds that pass when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_known_after_some_seconds() -> None:
    clock = Clock()
    pace = Pace("bytes", clock)
    for second in range(31):
        clock.now = second
        pace.note("dit (2 of 2)", 100_000_000 * second, 6_000_000_000)
        assert (pace.left is None) == (second < 12)  # a fifth of it
    assert pace.line("export") == "[export] dit (2 of 2): 3.0 of 6.0 GB, about 30 s left"


def test_what_was_there_already_makes_it_no_faster() -> None:
    """An interrupted export goes on behind 5 GB of T5, at 50 MB a second."""
    clock = Clock()
    pace = Pace("bytes", clock)
    pace.note("t5 (1 of 2)", 0, 6_000_000_000)
    for second in range(11):
        clock.now = second
        pace.note("dit (2 of 2)", 5_000_000_000 + 50_000_000 * second, 6_000_000_000)
    assert pace.left == pytest.approx(10)


def test_it_follows_the_last_minute() -> None:
    clock = Clock()
    pace = Pace("equal steps", clock)
    for step in range(200):
        clock.now += 1 if step < 100 else 10
        pace.note("a cat", step, 300)
    assert pace.left == pytest.approx(101 * 10, rel=0.1)


@pytest.mark.parametrize("unit", ["steps", "equal steps", "bytes"])
def test_no_estimate_of_what_does_not_move_or_is_uneven(unit: Unit) -> None:
    clock = Clock()
    pace = Pace(unit, clock)
    pace.note("dit", 0, 3)
    clock.now = 1000
    pace.note("dit", 0, 3)
    assert pace.time() == "16 min"
    if unit == "steps":
        pace.note("dit", 1, 3)
        assert pace.left is None


def test_durations() -> None:
    said = {0.2: "0 s", 59: "59 s", 61: "1 min 1 s", 1800: "30 min", 7300: "2 h 1 min"}
    assert {seconds: duration(seconds) for seconds in said} == said
