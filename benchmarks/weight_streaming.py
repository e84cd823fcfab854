"""A DiT that does not fit, by TensorRT on this machine's GPU: segments that stream beside segments loaded in each step.

    python benchmarks/weight_streaming.py out/onnx --segments 16 --out docs/benchmarks/weight-streaming.md

Cuts the DiT of an export, compiles its segments for the GPU so that they can stream, and runs a step with all of them
resident, on demand in one slot and in two, and streamed. Writes what each way takes, and whether the velocity is the
same. The exit code is 1 where it is not, or where streaming wants more room than the plan for the GPU's memory has.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

from ditforge import local_gpu, manifest
from ditforge.contract import DIT
from ditforge.engines import bench
from ditforge.engines.build import compile_parts, cut_graph, ranges
from ditforge.engines.compilers import Arrays, Compiler, Job, LoadedEngine, find_compiler
from ditforge.engines.gpus import Target, find_target
from ditforge.engines.memory.memory_plan import SLOTS
from ditforge.engines.profile import make_profiles
from ditforge.engines.runtime.loading import Chain, OnDemand
from ditforge.manifest import Manifest

COMPILERS = "tensorrt-rtx", "tensorrt"
TOLERANCE = 1e-3  # of the velocity's largest number: the kernels are the same, so their sums are too
EVERY = 0.01  # seconds between two looks at the GPU's memory


@dataclass(frozen=True)
class Row:
    """What a way to load the segments took: seconds to load, milliseconds of a step, and GB of two memories at most.

    error: the largest difference of the velocity from that of resident segments, relative to its largest number.
    """

    way: str
    load: float
    step: float
    gpu: float
    machine: float
    error: float


def compiler_for(target: Target) -> Compiler:
    """The first of COMPILERS whose engines run on the target."""
    found = [find_compiler(name) for name in COMPILERS]
    return next(one for one in found if all(device in one.executes for device in target.capabilities))


def compile_segments(
    source: Manifest, onnx: Path, folder: Path, compiler: Compiler, target: Target, count: int, side: int
) -> list[list[Path]]:
    """Compile the DiT of an export in `count` segments that can stream, for pictures of side x side pixels."""
    component, profiles = source.components[DIT], make_profiles(source.model, None, f"{side}x{side}", None)
    parts = cut_graph(onnx / f"{DIT}.onnx", component, source.model, profiles, count)
    shapes = ranges(component, profiles, source.model)
    job = Job(DIT, component, onnx / f"{DIT}.onnx", folder / DIT, target, shapes, lambda *_: None)
    return compile_parts(compiler, job, parts, count)


@contextmanager
def least_free() -> Iterator[list[int]]:
    """The least bytes of the GPU's memory that have been free during the block, in a list of one."""
    least, done = [bench.free_memory()], threading.Event()

    def look() -> None:
        while not done.wait(EVERY):
            least[0] = min(least[0], bench.free_memory())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield least
    finally:
        done.set()
        thread.join()


def measure(
    way: str, load: Callable[[], list[LoadedEngine]], slots: int, given: Arrays, runs: int, expected: list[Arrays]
) -> Row:
    """Load the segments in one way, and run steps. `expected` has the outputs of the first way that was measured."""
    before = bench.free_memory()
    with least_free() as least:
        began = time.perf_counter()
        segments = load()
        for segment in segments:
            segment.warm_up()
        chain = Chain(segments, slots)
        loaded = time.perf_counter() - began
        took = bench.timed(chain, given, runs)
        outputs = chain.run(given)
        chain.close()
    if not expected:
        expected.append(outputs)
    error = max(float(np.abs(outputs[name] - of).max() / np.abs(of).max()) for name, of in expected[0].items())
    machine = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Row(way, loaded, 1e3 * statistics.median(took), (before - least[0]) / 1e9, machine / 1e9, error)


def room_of(segments: Sequence[LoadedEngine], files: Sequence[Sequence[Path]]) -> tuple[int, int]:
    """The most bytes of the GPU's memory that streaming takes, and that are planned for it."""
    wanted = max(int(segment.engine.weight_streaming_scratch_memory_size) for segment in segments)  # type: ignore[attr-defined]
    return wanted, SLOTS * max(path.stat().st_size for part in files for path in part)


def report(source: Manifest, compiler: Compiler, rows: Sequence[Row], room: tuple[int, int], options: str) -> str:
    """The Markdown of it."""
    gpu = local_gpu.local_gpus()[0].product
    lines = [
        "# A DiT whose weights do not fit, by TensorRT", "",
        "Written by `benchmarks/weight_streaming.py`. The segments are the same plans in each row; "
        "docs/memory.md says which way is taken.", "",
        f"{gpu}, {compiler.name} {compiler.version()}, {source.model.name} in "
        f"{source.components[DIT].precision}, {options}, {date.today().isoformat()}.", "",
        "| segments | to load, s | a step, ms | GPU's memory, GB | machine's, GB so far | error |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row.way} | {row.load:.1f} | {row.step:.1f} | {row.gpu:.2f} | {row.machine:.2f} | {row.error:.1e} |"
            for row in rows
        ),
        "", f"Streaming takes {room[0]} bytes of the GPU's memory beside activations; the plan has {room[1]} for it.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--size", type=int, help="pictures of SIZE x SIZE; by default the model's own size")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    source, target = manifest.read(given.onnx, "onnx"), find_target("local")
    compiler, side = compiler_for(target), given.size or source.model.default_size
    name, version = str(target), compiler.version()
    assert compiler.load_frugally is not None
    with tempfile.TemporaryDirectory() as folder:
        files = compile_segments(source, given.onnx, Path(folder), compiler, target, given.segments, side)
        inputs = bench.inputs_of(DIT, source.components[DIT], source.model, (side, side), 1)
        whole = [partial(compiler.load_frugally, part, name, version, None) for part in files]
        streamed = [partial(compiler.load_frugally, part, name, version, 0) for part in files]
        room: list[tuple[int, int]] = []

        def stream() -> list[LoadedEngine]:
            segments = [load() for load in streamed]
            room.append(room_of(segments, files))
            return segments

        ways: dict[str, tuple[Callable[[], list[LoadedEngine]], int]] = {
            "resident": (lambda: [load() for load in whole], 1),
            "on demand, one slot": (lambda: [OnDemand(load) for load in whole], 1),
            "on demand, two slots": (lambda: [OnDemand(load) for load in whole], 2),
            "streamed": (stream, 1),
        }
        expected: list[Arrays] = []
        rows: list[Row] = []
        for way, (load, slots) in ways.items():
            rows.append(measure(way, load, slots, inputs, given.runs, expected))
            print(rows[-1], flush=True)
    text = report(source, compiler, rows, room[0], f"{given.segments} segments, {side} x {side} pixels")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text)
    print(text)
    if any(row.error > TOLERANCE for row in rows) or room[0][0] > room[0][1]:
        sys.exit("FAILED: streaming gives another velocity, or wants more room than is planned")


if __name__ == "__main__":
    main()
