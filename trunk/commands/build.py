"""`ditforge build`: ONNX becomes engines for one device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated

import typer

from ditforge import terminal
from ditforge.contract import DIT
from ditforge.options import Batch, Force, Gpu, Out, Residency, Segments, SizeFlags, VaeTile
from ditforge.reports import Json, show

if TYPE_CHECKING:
    from ditforge.engines.build import Built


@dataclass(frozen=True)
class BuiltEngine:
    """An engine of a build.

    kept: whether it was there already. reason: why it was compiled, or empty if it was kept. size: bytes of its files.
    """

    name: str
    precision: str
    compiler: str
    target: str
    segments: int
    size: int
    kept: bool
    reason: str


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote.

    gpu: the GPU in the user's words. seconds: how long the build took.
    takes: the sizes and batches of pictures that the engines take, in words.
    """

    folder: str
    model: str
    gpu: str
    seconds: float
    engines: tuple[BuiltEngine, ...]
    takes: str


def build(
    onnx: Annotated[Path, typer.Argument(metavar="ONNX_DIR", help="What export wrote.")],
    out: Out,
    sizes: SizeFlags,
    gpu: Gpu = "cpu",
    batch: Batch = None,
    vae_tile: VaeTile = None,
    segments: Segments = "auto",
    residency: Residency = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """ONNX to engines for one device. Engines that are there already are kept.

    Example: ditforge build out/onnx --gpu rtx4090 --resolutions 512-1536 --out out/engines
    """
    from ditforge import plan_report, stage_folder

    stage_folder.check_early(out, "engines")

    from ditforge.engines import build as building
    from ditforge.engines.memory.fitting import parse_segments

    began = perf_counter()
    count = parse_segments(segments)
    options = building.BuildOptions(
        gpu, **asdict(sizes), batch=batch, vae_tile=vae_tile, segments=count, residency=residency, force=force
    )
    with terminal.progress("build") as report:
        built = building.build(onnx, out, options, report, None if as_json else plan_report.say_plan)
    show(make_report(built, out, gpu, perf_counter() - began), say, as_json)


def make_report(built: Built, out: Path, gpu: str, seconds: float) -> BuildReport:
    """Make the report of a build."""
    from ditforge.contents import pictures, sizes_in_words

    engines = []
    for name, engine in built.manifest.engines.items():
        component = built.manifest.components[name]
        size = sum(file.size for file in component.files.values())
        made = component.precision, engine.compiler, engine.target, engine.placement.segments, size
        engines.append(BuiltEngine(name, *made, kept=name not in built.rebuilt, reason=built.rebuilt.get(name, "")))
    most = min((engine.max_batch for engine in built.manifest.engines.values() if engine.max_batch), default=None)
    takes = sizes_in_words(pictures(built.manifest.model)) + (f", in batches of up to {most}" if most else "")
    return BuildReport(str(out), built.manifest.model.name, gpu, round(seconds, 3), tuple(engines), takes)


def say(report: BuildReport) -> None:
    """Print which engines were compiled, with the reason if an older one was there, and the precision of the DiT."""
    from ditforge.engines.build import NEW

    compiled = [engine for engine in report.engines if not engine.kept]
    for engine in compiled:
        why = "" if engine.reason == NEW else f": {engine.reason}"
        terminal.note(f"built {engine.name}{why}")
    if not compiled:
        terminal.note(f"{report.folder} is up to date: no engine had to be built; it takes {report.takes}")
    for engine in report.engines:
        if engine.name == DIT:
            target = report.gpu if report.gpu == engine.target else f"{report.gpu} ({engine.target})"
            terminal.note(f"{engine.name} is {engine.precision}, for {target}")
