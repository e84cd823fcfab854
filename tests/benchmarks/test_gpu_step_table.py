"""The page of gpu_steps.py: which bars are met, what a line of it is, and that the kept page is of the kept file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_step_table import bars, limits, report, times

DOCS = Path(__file__).parents[2] / "docs" / "benchmarks"
Row = dict[str, Any]


@pytest.fixture
def rows() -> dict[str, Row]:
    """Made up: two engines at one size, and one of them for all sizes too."""

    def row(engine: str, everywhere: bool, ms: float, run: int = 1) -> Row:
        about = {"model": "flux.1-dev", "engine": engine, "all": everywhere, "size": 1024, "batch": 1, "run": run}
        return {**about, "ms": ms, "of_limit": ms / 100}

    return {
        "machine": {"gpu": "NVIDIA H100 80GB HBM3", "python": "3.12.3"},
        "flux.1-dev run 1": {"run": 1, "date": "2026-11-28", "bf16 TFLOP/s": 700.0},
        "compiled": row("diffusers compiled", False, 134.0),
        "static": row("inductor bf16", False, 130.0),
        "for all": row("inductor bf16", True, 170.0),
    }


def verdicts(rows: dict[str, Row], model: str = "flux.1-dev") -> dict[str, list[str]]:
    """The cells of the table of bars, by the name of the row."""
    cells = [line.strip("| ").split(" | ") for line in bars(rows, model) if line.startswith("| ditforge")]
    return {name: rest for name, *rest in cells}


def test_a_bar_is_met_or_missed_beside_the_same_run(rows: dict[str, Row]) -> None:
    name = "ditforge inductor, bf16, 1024 x 1024"
    ms, beside, bar, met, aim = verdicts(rows)[name]
    assert (ms, bar, met) == ("130", "1 of it", "met") and beside.startswith("0.97 of ")
    assert aim == "115 ms: MISSED"
    rows["static"]["ms"] = 134.1
    assert verdicts(rows)[name][3] == "MISSED"
    rows["static"]["run"] = 2
    assert verdicts(rows)[name][1].endswith("which another run measured")
    del rows["static"]
    assert verdicts(rows)[name][3] == "not measured"


def test_milliseconds_are_asked_of_the_gpu_that_they_are_of(rows: dict[str, Row]) -> None:
    assert "ditforge onnxruntime, fp16, 1024 x 1024" in verdicts(rows)
    rows["machine"]["gpu"] = "NVIDIA GeForce RTX 4090"
    found = verdicts(rows)
    assert "ditforge onnxruntime, fp16, 1024 x 1024" not in found
    assert found["ditforge inductor, bf16, 1024 x 1024"][4] == "-"


def test_what_was_compiled_for_all_sizes_is_a_line_of_its_own(rows: dict[str, Row]) -> None:
    lines = times([row for row in rows.values() if "ms" in row])
    assert "| ditforge inductor, bf16 | 130 (1.30) |" in lines
    assert "| ditforge inductor, bf16, for all sizes | 170 (1.70) |" in lines


def test_the_limit_is_shown_by_size(rows: dict[str, Row]) -> None:
    rows["flux.1-dev operations 1024"] = {
        "side": 1024, "products": 59.5e12, "attention": 14.9e12, "bf16_ms": 109.0, "fp8_ms": 67.7
    }  # fmt: skip
    assert "| 1024 x 1024 | 59.5 | 14.9 | 109 | 67.7 |" in limits(rows, "flux.1-dev")


def test_what_was_not_measured_says_why(rows: dict[str, Row], tmp_path: Path) -> None:
    rows["flux.1-dev inductor fp8 1024 x1"] = {"skipped": "the time was over"}
    report(tmp_path / "steps.md", rows)
    assert "- inductor fp8 1024 x1: the time was over" in (tmp_path / "steps.md").read_text()


def test_the_kept_page_is_that_of_the_kept_results(tmp_path: Path) -> None:
    (tmp_path / "steps.svg").touch()
    report(tmp_path / "steps.md", json.loads((DOCS / "steps.json").read_text()))
    assert (tmp_path / "steps.md").read_text() == (DOCS / "steps.md").read_text()
