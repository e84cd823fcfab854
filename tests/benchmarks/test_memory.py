"""What docs/memory.md has of plans is what plans are today."""

from __future__ import annotations

from pathlib import Path

import memory

DOCUMENT = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_table_of_plans_is_that_of_today() -> None:
    """If not: python benchmarks/memory.py --plans --out docs/memory.md"""
    written = DOCUMENT.read_text()
    assert written[written.index(memory.PLANS) :] == memory.planned()


def test_the_compilers_whose_engines_are_planned_are_named() -> None:
    planned = memory.planned()
    assert all(f"of `{name}`" in planned for name in memory.COMPILERS)
