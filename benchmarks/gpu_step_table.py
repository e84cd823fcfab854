"""The results of gpu_steps.py as a page of Markdown and as a plot."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_run import Row
from gpu_table import number, outcome, table, verdict

NAMES = {
    "diffusers eager": "diffusers, eager bf16",
    "diffusers compiled": "diffusers, bf16 compiled by blocks, cuDNN attention",
    "diffusers fp8": "diffusers, FP8 static per tensor, compiled by blocks",
    "inductor bf16": "ditforge inductor, bf16",
    "inductor fp8": "ditforge inductor, fp8",
    "onnxruntime fp16": "ditforge onnxruntime, fp16",
}
COLOURS = ("tab:gray", "tab:blue", "tab:cyan", "tab:red", "tab:orange", "tab:green")
ALL = ", for all sizes"


def precision_of(engine: str) -> str:
    """The precision of an engine's products that its limit is of."""
    return "fp8" if engine.endswith("fp8") else "bf16"


@dataclass(frozen=True)
class Bar:
    """What an engine's step must show at a size, one sample at a time, and what it aims for.

    beside, ratio: the engine of the same run that it may take at most that many times as long as.
    ms, aim: the milliseconds that it may take, and that are aimed for; they are of one model on one GPU.
    aim_of_limit: how many times the limit are aimed for.
    """

    engine: str
    size: int
    beside: str = ""
    ratio: float = 0.0
    ms: float | None = None
    aim: float | None = None
    aim_of_limit: float | None = None


TIMED, TIMED_ON = "flux.1-dev", "H100"  # what the milliseconds are of; the ratios are asked of every model
BARS = (
    Bar("inductor bf16", 1024, "diffusers compiled", 1.0, aim=115.0),
    Bar("inductor fp8", 1024, "diffusers fp8", 0.97, aim=80.0, aim_of_limit=1.25),
    Bar("inductor fp8", 512, "diffusers fp8", 0.95, aim=27.0),
    Bar("onnxruntime fp16", 1024, ms=145.0),
)


def steps_of(rows: dict[str, Row], model: str) -> list[Row]:
    """The rows of a model that were measured."""
    return [row for row in rows.values() if row.get("model") == model and "ms" in row]


def models_of(rows: dict[str, Row]) -> list[str]:
    """The models that anything is known of."""
    return list(dict.fromkeys(name.partition(" run ")[0] for name in rows if " run " in name))


def find(rows: Iterable[Row], engine: str, everywhere: bool, size: int, batch: int) -> Row:
    """A row that was measured; empty if there is none."""
    wanted = (engine, everywhere, size, batch)
    return next((row for row in rows if (row["engine"], row["all"], row["size"], row["batch"]) == wanted), {})


def lines_of(rows: list[Row]) -> list[tuple[str, bool]]:
    """The engines that were measured, in the order of NAMES; and those that were compiled for all sizes likewise."""
    found = {(row["engine"], row["all"]) for row in rows}
    return [(engine, everywhere) for engine in NAMES for everywhere in (False, True) if (engine, everywhere) in found]


def called(engine: str, everywhere: bool) -> str:
    """What a table calls an engine."""
    return NAMES[engine] + (ALL if everywhere else "")


def about(rows: dict[str, Row]) -> list[str]:
    """What was measured, on what."""
    found = rows.get("machine", {})
    versions = ", ".join(f"{name} {of}" for name, of in found.get("versions", {}).items())
    notes = [found["note"], ""] if "note" in found else []
    driver = f", driver {found['driver']}" if "driver" in found else ""
    cores = f", {found['cores']} cores" if "cores" in found else ""
    dates = sorted({row["date"] for name, row in rows.items() if " run " in name and "date" in row})
    return [
        "# A step of a DiT on a GPU",
        "",
        f"{', '.join(dates)}, {found.get('gpu')}{driver}{cores}, Python {found.get('python')}, {versions}.",
        "",
        "DiTs of full size with random weights. Milliseconds of one step, the median of 3 to 10; in brackets, how many "
        "times the limit that is: what its matrix products and its attention alone would take, at the best rates that "
        "these reach in the same run. A batch counts samples: two for a picture with classifier-free guidance. "
        "Rows without more words were compiled for that one size and batch, where they are compiled at all; rows “for "
        "all sizes” once for all of them. Written by these commands, of which a later one adds to the earlier:",
        "",
        *(f"    {command}" for command in found.get("commands", [])),
        "",
        *notes,
    ]


def limits(rows: dict[str, Row], model: str) -> list[str]:
    """The operations of a step and the limits."""
    sizes = sorted((row for name, row in rows.items() if name.startswith(f"{model} operations ")), key=side_of)
    runs = [row for name, row in rows.items() if name.startswith(f"{model} run ") and "bf16 TFLOP/s" in row]
    lines = [
        (
            f"{row['side']} x {row['side']}", number(row["products"] / 1e12, 4), number(row["attention"] / 1e12, 4),
            number(row.get("bf16_ms"), 4), number(row.get("fp8_ms"), 4),
        )
        for row in sizes
    ]  # fmt: skip
    kinds = [f"{name} TFLOP/s" for name in ("bf16", "fp8", "attention")]
    speeds = [
        (
            str(row["run"]),
            str(row["date"]),
            *(number(row.get(kind), 4) for kind in kinds),
            number(row.get("seconds"), 4),
        )
        for row in runs
    ]
    headings = ("one sample", "products, TFLOP", "attention, TFLOP", "limit in bf16, ms", "limit in fp8, ms")
    rates = ("run", "date", "bf16, TFLOP/s", "fp8, TFLOP/s", "attention in bf16, TFLOP/s", "took, s")
    note = "All products count as FP8 in the limit of fp8, also the few that stay in bf16."
    return [*table(headings, lines), note, "", *table(rates, speeds)]


def side_of(row: Row) -> int:
    """The side of a row's pictures."""
    return int(row["side"])


def cell(row: Row) -> str:
    """A step's milliseconds, and in brackets how many times the limit they are."""
    if not row:
        return "-"
    share = f" ({row['of_limit']:.2f})" if row.get("of_limit") else ""
    return number(row["ms"], 4) + share


def times(rows: list[Row]) -> list[str]:
    """A table for each batch."""
    page = []
    sizes, batches = (sorted({row[key] for row in rows}) for key in ("size", "batch"))
    for batch in batches:
        lines = [
            (called(*line), *(cell(find(rows, *line, size, batch)) for size in sizes))
            for line in lines_of(rows)
            if any(find(rows, *line, size, batch) for size in sizes)
        ]
        title = "One sample" if batch == 1 else f"{batch} samples"
        page += [f"### {title}, ms a step", "", *table(("", *(f"{size} x {size}" for size in sizes)), lines)]
    return page


def beside(rows: dict[str, Row], model: str) -> list[str]:
    """Errors, memory and loading of each engine, at the first shape that was measured."""
    measured = steps_of(rows, model)
    if not measured:
        return []
    sides = [row["side"] for name, row in rows.items() if name.startswith(f"{model} operations ")]
    first = sides[0] if sides else measured[0]["size"]
    lines = []
    for engine, everywhere in lines_of(measured):
        row, opened = find(measured, engine, everywhere, first, 1), rows.get(f"{model} {engine}", {})
        own = [one for one in measured if (one["engine"], one["all"]) == (engine, everywhere)]
        furthest = max((one["beside_eager"] for one in own if "beside_eager" in one), default=None)
        lines.append(
            (
                called(engine, everywhere), percent(row.get("error")), percent(furthest),
                number(1e3 / row["ms"]) if row else "-", number(row.get("served_ms"), 4), number(row.get("peak_gib")),
                number(opened.get("compile_s") or row.get("first_s")), number(opened.get("load_s")),
                number(opened.get("packages_mb")),
            )
        )  # fmt: skip
    headings = (
        "", "error", "most beside eager", "steps a second", "from NumPy to NumPy, ms", "peak, GiB", "compiling, s",
        "loading, s", "packages, MB",
    )  # fmt: skip
    reference = rows.get(f"{model} PyTorch bf16 beside fp32", {})
    note = (
        f"At {first} x {first}, one sample, but for the difference from eager bf16, the largest of all shapes. "
        "Errors are the L2 norm of the velocity's difference, relative to it; beside PyTorch in fp32 with the same "
        f"weights, PyTorch's own in bf16 is {percent(reference.get('error'))}. NumPy to NumPy is what is served, by a "
        "CUDA graph. Compiling is of all packages for ditforge, and else the first call."
    )
    return ["### Beside", "", *table(headings, lines), note, ""]


def percent(value: Any) -> str:
    """A share in percent."""
    return f"{100 * value:.2f} %" if isinstance(value, float) else "-"


def bars(rows: dict[str, Row], model: str) -> list[str]:
    """Whether the bars are met."""
    measured, lines = steps_of(rows, model), []
    for bar in BARS:
        row = find(measured, bar.engine, False, bar.size, 1)
        timed = model == TIMED and TIMED_ON in str(rows.get("machine", {}).get("gpu"))
        aim = bar.aim if timed else None
        if bar.beside:
            other = find(measured, bar.beside, False, bar.size, 1)
            ratio = row["ms"] / other["ms"] if row and other else None
            told = f"{number(ratio)} of {NAMES[bar.beside]} ({number(other.get('ms'), 4)} ms)" if ratio else "-"
            if ratio and row["run"] != other["run"]:
                told += ", which another run measured"
            wanted, met = f"{bar.ratio:g} of it", verdict(ratio, bar.ratio)
        elif timed:
            other = find(measured, "diffusers compiled", False, bar.size, 1)
            told, wanted, met = "", f"{bar.ms:g} ms", verdict(row.get("ms"), bar.ms or 0.0)
            aim = other.get("ms")
        else:
            continue
        aims = [] if aim is None else [f"{number(aim, 4)} ms: {verdict(row.get('ms'), aim)}"]
        if bar.aim_of_limit:
            share = row.get("of_limit")
            aims.append(f"{bar.aim_of_limit:g} of the limit ({number(share)}): {verdict(share, bar.aim_of_limit)}")
        name = f"{NAMES[bar.engine]}, {bar.size} x {bar.size}"
        lines.append((name, number(row.get("ms"), 4), told, wanted, met, "; ".join(aims) or "-"))
    return ["### Bars", "", *table(("one sample", "ms", "beside", "bar", "", "aim"), lines)]


def left_out(rows: dict[str, Row], model: str) -> list[str]:
    """What was not measured, and why."""
    why: dict[str, list[str]] = {}
    for name, row in rows.items():
        reason = outcome(row) or str(row.get("all_shapes_failed", ""))[:300]
        if name.startswith(f"{model} ") and reason:
            why.setdefault(reason, []).append(name.removeprefix(f"{model} "))
    lines = [f"- {', '.join(names)}: {reason}" for reason, names in why.items()]
    return ["### Not measured", "", *lines, ""] if lines else []


def report(file: Path, rows: dict[str, Row]) -> None:
    """Write the page."""
    lines = about(rows)
    drawn = file.with_suffix(".svg")
    if drawn.is_file():
        lines += [f"![Milliseconds of a step by size, and how many times the limit they are]({drawn.name})", ""]
    for model in models_of(rows):
        lines += [f"## {model}", "", *bars(rows, model), *limits(rows, model), *times(steps_of(rows, model))]
        lines += [*beside(rows, model), *left_out(rows, model)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines).rstrip() + "\n")


def plot(file: Path, rows: dict[str, Row]) -> bool:
    """Draw a step's milliseconds by size, and how many times the limit they are. Returns whether it could be drawn."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: pip install matplotlib, and then --render", flush=True)
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    models = [model for model in models_of(rows) if steps_of(rows, model)]
    if not models:
        return False
    pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "steps", "font.size": 9})
    figure, grid = pyplot.subplots(len(models), 2, figsize=(11, 4.2 * len(models)), squeeze=False)
    for (times_of, shares), model in zip(grid, models, strict=True):
        measured = [row for row in steps_of(rows, model) if row["batch"] == 1]
        sizes = sorted({row["size"] for row in measured})
        for engine, everywhere in lines_of(measured):
            own = [row for size in sizes if (row := find(measured, engine, everywhere, size, 1))]
            style = {
                "color": COLOURS[list(NAMES).index(engine)],
                "linestyle": "--" if everywhere else "-",
                "marker": "o",
                "label": called(engine, everywhere),
            }
            times_of.plot([row["size"] for row in own], [row["ms"] for row in own], **style)
            limited = [row for row in own if row.get("of_limit")]
            shares.plot([row["size"] for row in limited], [row["of_limit"] for row in limited], **style)
        times_of.set(title=f"{model}, one sample", ylabel="ms a step", ylim=(0, None))
        shares.set(title="times the limit", ylim=(0, None))
        shares.axhline(1.0, color="black", linewidth=0.8)
        for axes in (times_of, shares):
            axes.set(xlabel="pixels a side")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        times_of.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return True
