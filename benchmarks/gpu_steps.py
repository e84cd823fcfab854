"""How long a step of a DiT takes on this machine's GPU: ditforge's engines beside diffusers, in one run and one table.

    python benchmarks/gpu_steps.py flux.1-dev --out out/steps.json --budget 500

The DiT has its full size and random weights. A row is a way to compute it (gpu_step_engines.py), a size and a batch.
What is compiled is compiled for the sizes of `--static` each by itself, and once for all sizes and batches. Beside the
times is the limit: what the matrix products and the attention alone would take at the rates measured in the same run
(gpu_step_limits.py).

The rows that tell most come first: 1024 x 1024, one sample at a time. After `--budget` seconds no other row is begun,
and another run with the same `--out`, on the same GPU and with the same versions, makes those that are missing. Results
are in the file from the moment they are known, with a table in Markdown and a plot beside it; `--render` makes these
two from the file alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_run import Results, Row, versions_of
from gpu_step_engines import (
    ENGINES,
    Ready,
    Shape,
    Subject,
    diffusers_step,
    freed,
    random_state,
    ranges_of,
    read_dit,
    trace_programs,
    with_weights,
)
from gpu_step_limits import DEVICE, Operations, count, has_fp8, limit_ms, measured, rates
from gpu_step_table import plot, precision_of, report
from torch.nn.attention import sdpa_kernel

from ditforge import local_gpu
from ditforge.engines.compilers import inductor
from ditforge.engines.compilers.region_packages import ATTENTION

SHM = Path("/dev/shm")
PACKAGES = ("torch", "triton", "diffusers", "onnxruntime-gpu", "onnxruntime")
BY_DEFAULT = [name for name in ENGINES if not name.startswith("onnxruntime")]
# The engines that come first in the round of all sizes, and in that of batches. The last one of a round stays open if
# the next one begins with it.
SIZES_FIRST, BATCHES_FIRST = ("inductor fp8", "inductor bf16"), ("diffusers eager", "inductor fp8", "inductor bf16")

Wanted = tuple[Shape, bool]  # a shape, and whether what was compiled for all shapes is to compute it
Group = tuple[str, list[Wanted]]  # an engine, and what it is to compute, one after the other


def numbers(text: str) -> list[int]:
    """Numbers with commas between them."""
    return [int(part) for part in text.split(",") if part]


def words(text: str) -> list[str]:
    """Words with commas between them."""
    return [part for part in text.split(",") if part]


def shapes(text: str) -> list[Shape]:
    """Shapes such as 1024, or 1024x4 for four samples, with commas between them."""
    return [Shape(int(side), int(batch or 1)) for side, _, batch in (part.partition("x") for part in words(text))]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "models", nargs="*", help="published models such as flux.1-dev, or folders in diffusers' layout"
    )
    parser.add_argument("--sizes", type=numbers, default=[1024, 512, 1536, 768], help="sides in pixels, first to last")
    parser.add_argument("--batches", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--engines", type=words, default=BY_DEFAULT, help=f"of {','.join(ENGINES)}")
    parser.add_argument("--static", type=shapes, default=shapes("1024,512"), help="compiled each by itself: 1024,512x4")
    parser.add_argument("--no-all", action="store_true", help="compile nothing for all sizes and batches")
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no row is begun")
    parser.add_argument("--profile", action="store_true", help="also name the kernels of engines, at the first shape")
    parser.add_argument("--settings", type=json.loads, default={}, help="of Inductor, as JSON")
    parser.add_argument("--render", action="store_true", help="measure nothing; only make the table and the plot")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/steps.json"))
    args = parser.parse_args()
    if unknown := set(args.engines) - set(ENGINES):
        parser.error(f"--engines takes {','.join(ENGINES)}, not {','.join(sorted(unknown))}")
    if not args.render and not args.models:
        parser.error("name a model, such as flux.1-dev")
    return args


def machine() -> Row:
    """What it runs on."""
    found: Row = {"gpu": "none: the CPU"}
    if DEVICE == "cuda":
        gpu = local_gpu.local_gpus()[0]
        found = {"gpu": gpu.product, "driver": gpu.driver}
    return found | {"cores": os.cpu_count(), "python": platform.python_version(), "versions": versions_of(PACKAGES)}


def order(given: argparse.Namespace) -> Iterator[Group]:
    """What is measured, in the order of what it tells: the first shapes, then one sample of all sizes, then batches."""
    engines: list[str] = given.engines
    each = [(shape, False) for shape in given.static]
    if not has_fp8():
        engines = [name for name in engines if not name.endswith("fp8")]

    def wanted(name: str, several: Iterable[Shape]) -> list[Wanted]:
        """Eager and ONNX Runtime take all shapes as they are; others have to be compiled for all."""
        if compiled(name):
            return [] if given.no_all else [(shape, True) for shape in several]
        return [(shape, False) for shape in several if shape not in given.static]

    alone = [Shape(side, 1) for side in given.sizes]
    batches = [Shape(side, batch) for side in given.sizes for batch in given.batches if batch > 1]
    if 1 not in given.batches:
        alone = []
    for name in engines:
        yield name, each
    for several, first in ((alone, SIZES_FIRST), (batches, BATCHES_FIRST)):
        for name in sorted(engines, key=lambda name: first.index(name) if name in first else len(first)):
            yield name, wanted(name, several)


def compiled(name: str) -> bool:
    """Whether an engine is compiled for shapes."""
    return name != "diffusers eager" and not name.startswith("onnxruntime")


def row_name(model: str, engine: str, shape: Shape, everywhere: bool) -> str:
    """The name of a row."""
    return f"{model} {engine}{' all' if everywhere else ''} {shape}"


def error(made: torch.Tensor, expected: torch.Tensor) -> float:
    """The L2 norm of the difference, relative to that of what is expected."""
    a, b = made.double().cpu(), expected.double().cpu()
    return float((a - b).norm() / b.norm())


class Bench:
    """The measurements of one model in one run."""

    def __init__(self, given: argparse.Namespace, subject: Subject, number: int) -> None:
        self.given, self.subject, self.results, self.run = given, subject, subject.results, number
        self.first = Shape(given.sizes[0], 1)
        self.exact: torch.Tensor | None = None  # the velocity of PyTorch in fp32, at the first shape
        self.eager: dict[Shape, torch.Tensor] = {}
        self.operations: dict[int, Operations] = {}
        self.speeds: dict[str, float] = {}

    def prepare(self) -> None:
        """What rows are compared with: the operations of a step, the rates, and the velocity in fp32."""
        subject, network = self.subject, self.subject.network
        own = with_weights(network, subject.state, network.dtype)
        with sdpa_kernel(ATTENTION, set_priority=True):
            for side in self.given.sizes:
                inputs = subject.inputs(Shape(side, 1))
                self.operations[side] = found = count(diffusers_step(own, inputs, network.dtype))
                self.results.note(f"{subject.model} operations {side}", side=side, **asdict(found))
            step = diffusers_step(own, subject.inputs(self.first), network.dtype)
            subject.amax |= ranges_of(own, network, step)
            self.eager[self.first] = step().float().cpu()
        del own, step
        freed()
        counted = self.operations.values()
        largest = max(self.given.batches)
        first = self.operations[self.first.side]
        products = [one.product for one in counted] + [(first.product[0] * largest, *first.product[1:])]
        heads = [one.heads for one in counted] + [(first.heads[0] * largest, *first.heads[1:])]
        self.speeds = rates(dict.fromkeys(products), dict.fromkeys(heads))
        tflops = {f"{name} TFLOP/s": speed / 1e12 for name, speed in self.speeds.items()}
        self.results.note(f"{subject.model} run {self.run}", run=self.run, date=str(date.today()), **tflops)
        for side, operations in self.operations.items():
            limits = {f"{name}_ms": limit_ms(operations, 1, self.speeds, name) for name in ("bf16", "fp8")}
            self.results.note(f"{subject.model} operations {side}", **limits)

    def in_fp32(self) -> None:
        """The velocity of PyTorch in fp32 at the first shape, which needs twice the weights' memory beside them."""
        network = self.subject.network
        wide = with_weights(network, self.subject.state, torch.float32)
        inputs = self.subject.inputs(self.first)
        self.exact = diffusers_step(wide, inputs, torch.float32)().cpu()
        name = f"{self.subject.model} PyTorch bf16 beside fp32"
        self.results.note(name, error=error(self.eager[self.first], self.exact))

    def group(self, name: str, wanted: list[Wanted]) -> None:
        """Measure the rows of one engine that are missing."""
        model = self.subject.model
        rows = {row_name(model, name, shape, everywhere): (shape, everywhere) for shape, everywhere in wanted}
        rows = {row: one for row, one in rows.items() if "ms" not in self.results.rows.get(row, {})}
        if self.results.left <= 0:
            for row in rows:
                self.results.attempted(row, lambda: None)  # which notes that the time was over
        elif rows:
            opened = f"{model} {name}"
            kept = self.results.rows.get(opened, {})
            self.results.attempted(opened, partial(self.open_and_measure, name, rows, kept))
            freed()

    def open_and_measure(self, name: str, rows: dict[str, Wanted], kept: Row) -> None:
        """Open an engine, and measure its rows. `kept` is what an earlier run or round noted of it."""
        self.results.note(f"{self.subject.model} {name}", **{k: v for k, v in kept.items() if k != "failed"})
        with ENGINES[name](self.subject) as step_of:
            for row, (shape, everywhere) in rows.items():
                self.results.attempted(row, partial(self.measure, row, name, shape, everywhere, step_of))
                freed()

    def measure(
        self, row: str, name: str, shape: Shape, everywhere: bool, step_of: Callable[[Shape, bool], Ready]
    ) -> None:
        """Measure one row."""
        model, batch = self.subject.model, shape.batch
        ready = step_of(shape, everywhere)
        found: dict[str, Any] = dict(measured(ready.run, ready.foreign))
        limit = limit_ms(self.operations[shape.side], batch, self.speeds, precision_of(name))
        if limit is not None:
            found |= {"limit_ms": limit, "of_limit": found["ms"] / limit}
        made = ready.run().float().cpu()
        if name == "diffusers eager":
            self.eager[shape] = made
        elif (beside := self.eager_velocity(shape)) is not None:
            found["beside_eager"] = error(made, beside)
        if shape == self.first and self.exact is not None:
            found["error"] = error(made, self.exact)
        about = {"model": model, "engine": name, "all": everywhere, "size": shape.side, "batch": batch, "run": self.run}
        self.results.note(row, **about, **found)
        if ready.served:
            served = measured(ready.served, ready.foreign)
            self.results.note(row, served_ms=served["ms"], served_peak_gib=served.get("peak_gib"))
        if self.given.profile and shape == self.first and compiled(name):
            self.results.note(f"{row} kernels", kernels=kernels(ready.run))

    def eager_velocity(self, shape: Shape) -> torch.Tensor | None:
        """What diffusers computes eagerly, if this run has computed it, or for one sample at a time."""
        if shape not in self.eager and shape.batch == 1:
            network = self.subject.network
            own = with_weights(network, self.subject.state, network.dtype)
            with sdpa_kernel(ATTENTION, set_priority=True):
                self.eager[shape] = diffusers_step(own, self.subject.inputs(shape), network.dtype)().float().cpu()
        return self.eager.get(shape)


def kernels(step: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """The kernels that take the most time in one step: their names, calls and milliseconds."""
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as seen:
        step()
    time_of = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    found = sorted(seen.key_averages(), key=lambda event: -getattr(event, time_of))
    return [(event.key[:110], event.count, round(getattr(event, time_of) / 1e3, 2)) for event in found[:24]]


def measure_model(given: argparse.Namespace, model: str, results: Results, tracing: Executor) -> None:
    """All rows of a model that are missing."""
    groups: list[Group] = []
    for engine, wanted in order(given):
        if groups and groups[-1][0] == engine:
            groups[-1][1].extend(wanted)
        else:
            groups.append((engine, list(wanted)))
    everything = [row_name(model, name, *one) for name, wanted in groups for one in wanted]
    missing = [row for row in everything if "ms" not in results.rows.get(row, {})]
    if not missing:
        print(f"{model}: nothing is missing", flush=True)
        return
    if results.left <= 0:
        for row in missing:
            results.attempted(row, lambda: None)
        return
    number = 1 + max((row["run"] for key, row in results.rows.items() if key.startswith(f"{model} run ")), default=0)
    start = time.perf_counter()
    programs = tracing.submit(trace_programs, model, "bf16")  # in another process, while the GPU is measured
    network = read_dit(model, "bf16")
    largest = None if given.no_all else Shape(max(given.sizes), max(given.batches))
    smallest = Shape(min(given.sizes), 1)
    with TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as folder:
        subject = Subject(
            model, network, random_state(network), given.static, smallest, largest, Path(folder), results, programs
        )
        results.note(f"{model} run {number}", run=number, made_s=time.perf_counter() - start)
        bench = Bench(given, subject, number)
        with torch.no_grad():
            bench.prepare()
            if any(row.endswith(f" {bench.first}") for row in missing):
                results.attempted(f"{model} PyTorch bf16 beside fp32", bench.in_fp32)
                freed()
            for engine, wanted in groups:
                bench.group(engine, wanted)
        results.note(f"{model} run {number}", seconds=time.perf_counter() - start)


def main() -> None:
    """Measure what the arguments ask for."""
    given = parse()
    rows = json.loads(given.out.read_text()) if given.out.is_file() else {}
    table = given.out.with_suffix(".md")
    if given.render:
        plot(given.out.with_suffix(".svg"), rows)
        report(table, rows)
        return
    began = time.monotonic()
    inductor.SETTINGS.update(given.settings)
    here, before = machine(), rows.get("machine", {})
    if changed := [key for key in ("gpu", "versions") if before and before.get(key) != here[key]]:
        told = ", ".join(f"{key} {before.get(key)} and now {here[key]}" for key in changed)
        sys.exit(f"{given.out} is of another GPU or of other versions: {told}\nfix:   another --out, or delete it")
    results = Results((given.out,), began + given.budget, rows, changed=partial(report, table))
    command = "python benchmarks/gpu_steps.py " + " ".join(sys.argv[1:])
    results.note("machine", **here, commands=[*before.get("commands", []), command])
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as tracing:
        for model in given.models:
            measure_model(given, model, results, tracing)
            freed()
    plot(given.out.with_suffix(".svg"), results.rows)
    report(table, results.rows)
    print(table.read_text(), flush=True)


if __name__ == "__main__":
    main()
