"""When two calibrations are the same: their ranges but for rounding."""

from __future__ import annotations

import pytest

from ditforge.export.quantisation.calibration import Calibration

# The same weights lie elsewhere in memory when they come from another file, and on some CPUs (AMD's, for one) MKL sums
# in an order that depends on how its operands are aligned. That is float32's rounding, 6e-8 of a sum, through the few
# layers that the small models have: 3e-7 of a range was seen.
ROUNDING = 1e-5
# What other weights or another prompt do to some range at least: they change it by more than a tenth here.
CHANGE = 0.01


def largest_change(found: Calibration, other: Calibration) -> float:
    """The largest relative difference of a linear's range; both have the same linears."""
    assert found.amax.keys() == other.amax.keys()
    return max(abs(amax / other.amax[name] - 1) for name, amax in found.amax.items())


def assert_same_ranges(found: Calibration, expected: Calibration) -> None:
    """Those of the same weights and prompts."""
    assert found.amax == pytest.approx(expected.amax, rel=ROUNDING, abs=0)


def assert_same(found: Calibration, expected: Calibration) -> None:
    """The same ranges, and all that is said of them is equal."""
    assert_same_ranges(found, expected)
    assert found.model_copy(update={"amax": expected.amax}) == expected
