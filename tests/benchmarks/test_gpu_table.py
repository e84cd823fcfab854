"""The page about whole pictures says what the record says, and all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from gpu_run import Results, in_memory, why
from gpu_table import report

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks" / "pipeline.md"
CAUSE = "CUDA out of memory"


def page_of(rows: dict[str, Any], folder: Path) -> str:
    report(folder / "page.md", rows)
    return (folder / "page.md").read_text()


def test_the_page_is_that_of_the_record(tmp_path: Path) -> None:
    """If not: report(Path("docs/benchmarks/pipeline.md"), rows) of benchmarks/gpu_table.py writes it again."""
    assert PAGE.read_text() == page_of(json.loads(PAGE.with_suffix(".json").read_text()), tmp_path)


def test_failures_are_told_to_their_end(tmp_path: Path) -> None:
    long = f"Failed: the server ended with 1: {'a frame of a trace, ' * 50}{CAUSE} | 2 GiB"
    rows = {
        "12 GiB": {"card": 12.0, "failed": long},
        "8 GiB": {"card": 8.0, "pictures": 1, "failures": [f"3: {long}"]},
        "4 clients": {"clients": 4, "errors": [f"DitforgeError: {long}\nfix:   less"]},
        "export": {"failed": long},
        "bench": {"skipped": "the time was over"},
    }
    page = page_of(rows, tmp_path)
    (section,) = page.split("## What failed\n")[1:]
    assert section.count(CAUSE) == 4
    for line in page.splitlines():
        if line.startswith("| "):
            assert "trace" not in line or line in section
    assert "failed: see below" in page and "\n| fix" not in page
    assert "What failed" not in page_of({"bench": {"skipped": "the time was over"}}, tmp_path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            {"served": {"files_in_memory": 1.0}},
            "When the server started, 100 % of the repository's bytes were in memory.",
        ),
        ({"served": {"files_in_memory": 0.031}}, "3.1 % of the repository's bytes were in memory."),
        ({"served": {}}, "Whether the repository's files were in memory when the server started was not recorded."),
        ({"export": {}}, ""),
    ],
)
def test_whether_files_were_in_memory_is_what_was_recorded(rows: dict[str, Any], said: str, tmp_path: Path) -> None:
    page = page_of(rows, tmp_path)
    assert said in page and ("in memory" in page) == bool(said)


def test_the_error_in_a_log_is_told_from_its_beginning(tmp_path: Path) -> None:
    """Also if it is long, and whatever stands before it; a log without one is told by its end."""
    log = tmp_path / "log"
    log.write_text("x\n" * 5000 + f"error: {CAUSE}: " + "At: frame\n" * 500 + "fix:   free some\n")
    told = why(log)
    assert told.startswith(f"error: {CAUSE}") and told.endswith("fix: free some") and "\n" not in told
    log.write_text("x\n" * 5000 + "the end")
    assert why(log).endswith("the end")
    assert why(tmp_path / "none") == ""
    results = Results((tmp_path / "results.json",), float("inf"))
    results.attempted("build", lambda: (_ for _ in ()).throw(ValueError(f"{CAUSE} {'at ' * 2000}")))
    assert results.rows["build"]["failed"].startswith(f"ValueError: {CAUSE}")


def test_what_is_in_memory(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert in_memory(tmp_path) == 1.0
    for name in ("read", "forgotten"):
        (tmp_path / name).write_bytes(os.urandom(1 << 20))
    assert in_memory(tmp_path) == 1.0
    with (tmp_path / "forgotten").open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(tmp_path) == 1.0:
        pytest.skip("this file system keeps its files in memory")
    assert in_memory(tmp_path) == pytest.approx(0.5, abs=0.01)
