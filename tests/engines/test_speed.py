"""Estimates of speed: on the GPU that was measured they are what was measured."""

from __future__ import annotations

import pytest

from ditforge.engines import speed
from ditforge.engines.gpus import GPUS
from ditforge.engines.speed import RATES, estimate


def test_the_h100_is_what_was_measured() -> None:
    found = estimate("h100", "bf16", 74.4e12, 28)
    assert found is not None
    assert (found.step_fast, found.step_slow) == pytest.approx((0.1336, 0.1957))
    assert (found.picture_fast, found.picture_slow) == pytest.approx((3.74, 5.48), rel=0.01)
    fp8 = estimate("h100", "fp8", 74.4e12, 28)
    assert fp8 is not None and fp8.step_fast == pytest.approx(0.096)


def test_half_the_rate_or_twice_the_work_takes_twice_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RATES, "half", RATES["h100"] / 2)
    whole, half = estimate("h100", "fp16", 1e13, 4), estimate("half", "fp16", 1e13, 4)
    twice = estimate("h100", "fp16", 2e13, 4)
    assert whole and half and twice
    assert half.step_slow == pytest.approx(2 * whole.step_slow) == pytest.approx(twice.step_slow)


def test_what_is_not_known() -> None:
    assert estimate("rtx9090", "bf16", 1e12, 1) is None
    assert estimate("rtx4090", "fp32", 1e12, 1) is None
    assert set(RATES) <= {gpu.name for gpu in GPUS}
    for gpu in ("rtx4090", "rtx3060", "l4"):  # weights of 8 bits are computed with in 16
        assert estimate(gpu, "fp8-weights", 1e12, 1) == estimate(gpu, "bf16", 1e12, 1)
    assert speed.FAST < speed.SLOW
