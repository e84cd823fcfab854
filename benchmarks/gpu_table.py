"""The results of gpu_pipeline.py as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_run import Row

PICTURE_S, START_S, ADDS_PERCENT, OF_PLAN = 3.0, 30.0, 1.0, 10.0  # the bars, the last in percent of the plan
STAGES = ("export", "build", "repo")
BAR_STEPS, BAR_SIDE = 28, 1024  # the bars are for so many steps, and pictures of that many pixels on each side


def number(value: Any, digits: int = 3) -> str:
    """A number with so many significant digits, or a dash."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return "-"
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def verdict(value: Any, bar: float) -> str:
    """Whether a number is at most the bar."""
    if not isinstance(value, int | float):
        return "not measured"
    return "met" if value <= bar else "MISSED"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, and an empty one."""
    rules = " | ".join("---" for _ in headings)
    return [f"| {' | '.join(headings)} |", f"| {rules} |", *(f"| {' | '.join(row)} |" for row in rows), ""]


def outcome(row: Row) -> str:
    """Why a row has no figures; empty if it has. What failed is told at length below the tables."""
    return "failed: see below" if row.get("failed") else str(row.get("skipped") or "")


def files(rows: dict[str, Row]) -> str:
    """Whether the repository's files had to be read from disk when the server started; empty if none was started."""
    start = rows.get("served")
    if start is None:
        return ""
    if "files_in_memory" not in start:
        return " Whether the repository's files were in memory when the server started was not recorded."
    return f" When the server started, {100 * start['files_in_memory']:.3g} % of the repository's bytes were in memory."


def about(rows: dict[str, Row]) -> list[str]:
    """What was measured, on what."""
    found = rows.get("machine", {})
    versions = ", ".join(f"{name} {of}" for name, of in found.get("versions", {}).items())
    driver = f", driver {found['driver']}" if "driver" in found else ""
    pixels = f"{found.get('side')} x {found.get('side')}"
    return [
        "# Whole pictures on a GPU",
        "",
        f"{found.get('date')}, {found.get('gpu')}{driver}, {found.get('cores')} cores, "
        f"{number(found.get('memory_gib'))} GiB of memory, Python {found.get('python')}, {versions}.",
        "",
        f"{found.get('model')} in {found.get('precision')} by {found.get('compiler')}, with random weights, {pixels} "
        f"pixels, batch 1.{files(rows)} Written by these commands, of which a later one adds to the earlier:",
        "",
        *(f"    {command}" for command in found.get("commands", [])),
        "",
    ]


def made(rows: dict[str, Row]) -> list[str]:
    """The commands that make a repository."""
    lines = []
    for name in STAGES:
        if row := rows.get(name):
            size = row.get("bytes")
            written = f"{size / 1e9:.2f} GB" if size else "-"
            lines.append(
                (name, number(row.get("seconds"), 4), written, number(row.get("peak_gib")), outcome(row)),
            )
    if not lines:
        return []
    note = "The peak is that of a command's largest process, with the files that it maps."
    return ["## Made", "", *table(("command", "seconds", "written", "peak, GiB", ""), lines), note, ""]


def served(rows: dict[str, Row]) -> list[str]:
    """From the start of a server to pictures one at a time, and what serving adds."""
    first, turn, start, bench = (rows.get(name, {}) for name in ("first picture", "one at a time", "served", "bench"))
    if not (first or turn or start):
        return []
    steps = turn.get("steps", BAR_STEPS)
    fair = steps == BAR_STEPS and rows.get("machine", {}).get("side") == BAR_SIDE

    def against(value: Any, bar: float) -> str:
        return verdict(value, bar) if fair else f"not compared: it is for {BAR_STEPS} steps at {BAR_SIDE} x {BAR_SIDE}"

    alone = bench.get("models", {}).get("dit", {}).get("ms")
    lines = [
        ("start of `serve` until it is ready, s", number(start.get("ready_s")), outcome(start)),
        (
            "start of `serve` to the end of the first picture, s",
            number(first.get("seconds_since_start")),
            f"bar {START_S:g}: {against(first.get('seconds_since_start'), START_S)} {outcome(first)}",
        ),
        (
            f"a picture of {steps} steps, median of {turn.get('pictures', 0)}, s",
            number(turn.get("median_s")),
            f"bar {PICTURE_S:g}: {against(turn.get('median_s'), PICTURE_S)} {outcome(turn)}",
        ),
        ("a step as the client sees it, median, ms", number(turn.get("step_ms"), 4), ""),
        ("the same, from pictures of fewer steps, ms", number(turn.get("step_derived_ms"), 4), ""),
        (
            "what serving adds to it beside the DiT's model in Triton, ms",
            number(turn.get("serving_adds_ms")),
            f"{number(turn.get('serving_adds_percent'))} %, bar {ADDS_PERCENT:g} %: "
            f"{against(turn.get('serving_adds_percent'), ADDS_PERCENT)}",
        ),
        (
            f"what serving adds beside the engine alone (`ditforge bench`, {number(alone, 4)} ms), ms",
            number(bench.get("serving_adds_ms")),
            f"{number(bench.get('serving_adds_percent'))} %, bar {ADDS_PERCENT:g} %: "
            f"{against(bench.get('serving_adds_percent'), ADDS_PERCENT)} {outcome(bench)}",
        ),
        ("GPU memory at its peak, GiB", number(start.get("gpu_peak_gib"), 4), str(start.get("gpu_memory", ""))),
        ("the same seed gives the same picture", str(turn.get("same_seed_same_picture", "-")), ""),
        ("pictures are finite and not of one colour", str(turn.get("valid", "-")), ""),
    ]
    page = ["## Served", "", *table(("what", "measured", ""), lines)]
    if models := turn.get("models"):
        alone_of = bench.get("models", {})
        engines = [
            (
                name, str(of["calls"]), number(of["compute_infer"], 4), number(of["compute_input"]),
                number(of["queue"]), number(alone_of.get(name, {}).get("ms"), 4),
            )
            for name, of in models.items()
        ]  # fmt: skip
        page += table(("Triton's model", "calls", "compute, ms", "input, ms", "queue, ms", "engine alone, ms"), engines)
    return page


def clients(rows: dict[str, Row]) -> list[str]:
    """Pictures a minute of several clients."""
    lines = [
        (
            str(row.get("clients", name.split()[0])), str(row.get("pictures", "-")),
            number(row.get("pictures_a_minute")), number(row.get("median_s")),
            outcome(row) or f"{len(row.get('errors', []))} errors",
        )
        for name, row in sorted(rows.items(), key=lambda item: item[1].get("clients", 0))
        if name.endswith(" clients")
    ]  # fmt: skip
    headings = ("clients", "pictures", "a minute", "s a picture, median", "")
    return ["## Several clients", "", *table(headings, lines)] if lines else []


def cards(rows: dict[str, Row]) -> list[str]:
    """Cards of less memory, imitated."""
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: -(item[1].get("card") or 0)):
        if name.endswith(" GiB") and "diffusers" not in name:
            off = abs(row["of_plan"] - 1) * 100 if "of_plan" in row else None
            tile = f", tile {row['vae_tile']}" if row.get("vae_tile") else ""
            failures = len(row.get("failures", []))
            within = (
                "" if off is None else f"{100 * row['of_plan']:.0f} %; within {OF_PLAN:g} %: {verdict(off, OF_PLAN)}"
            )
            pictures = f"{row.get('pictures', 0)} of {row.get('asked', '-')}"
            lines.append(
                (
                    name, f"{row.get('strategy', '-')}{tile}", number(row.get("plan_gib")),
                    number(row.get("peak_gib")), within, pictures, str(failures), number(row.get("median_s")),
                    number(row.get("step_ms"), 4), outcome(row) or str(row.get("cap", "")),
                )
            )  # fmt: skip
    headings = (
        "card",
        "plan",
        "its peak, GiB",
        "measured, GiB",
        "of it",
        "pictures",
        "failed",
        "s a picture",
        "ms a step",
        "",
    )
    note = "A card is imitated by a process that leaves 15/16 of its memory; the speed is that of this GPU and its bus."
    return ["## Cards of less memory", "", note, "", *table(headings, lines)] if lines else []


def beside(rows: dict[str, Row]) -> list[str]:
    """Diffusers, with the whole GPU and under caps."""
    lines = [
        (
            "whole" if not row.get("card") else f"{row['card']:g} GiB", str(row.get("way", name)),
            number(row.get("text_s")), number(row.get("step_s")), number(row.get("vae_s")),
            number(row.get("picture_s")), number(row.get("peak_gib")), outcome(row),
        )
        for name, row in rows.items()
        if name.startswith("diffusers ") and row
    ]  # fmt: skip
    if not lines:
        return []
    steps = next((row for row in rows.values() if "of" in row), {"steps": "-", "of": BAR_STEPS})
    whole = f"{steps['of']} steps, extrapolated, s"
    headings = ("card", "diffusers, bf16", "text, s", "a step, s", "decoding, s", whole, "peak, GiB", "")
    note = f"A picture of {steps['steps']} steps was made; the seconds of {steps['of']} are extrapolated from it."
    return ["## Diffusers beside", "", note, "", *table(headings, lines)]


def failed(rows: dict[str, Row]) -> list[str]:
    """Everything that failed, with all that is known of why."""
    why = [
        (name, " ".join(str(text).split()).replace("|", "/"))
        for name, row in rows.items()
        for text in [*filter(None, [row.get("failed")]), *row.get("errors", []), *row.get("failures", [])]
    ]
    return ["## What failed", "", *table(("what", "why"), why)] if why else []


def report(file: Path, rows: dict[str, Row]) -> None:
    """Write the page."""
    parts = (about, made, served, clients, cards, beside, failed)
    text = "\n".join(line for part in parts for line in part(rows)).rstrip()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")
