"""What docs/memory.md has of plans is what plans are today."""

from __future__ import annotations

from pathlib import Path

import memory

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_table_of_plans_is_that_of_today() -> None:
    """If not: python benchmarks/memory.py --plans --out docs/memory.md"""
    written = DOCUMENT.read_text()
    assert written[written.index(memory.PLANS) :] == memory.planned()


def test_the_compiler_whose_engines_are_planned_is_named() -> None:
    assert f"engines of `{memory.COMPILER}`" in memory.planned()
