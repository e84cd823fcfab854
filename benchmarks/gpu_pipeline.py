"""Whole pictures of a full-size model with random weights on this machine's GPU, from the export to the client.

    python benchmarks/gpu_pipeline.py flux.1-dev --precision fp8 --out docs/benchmarks/pipeline.json

Each stage can be left out (`--only`), and takes up what an earlier run left in `--folder`:

make: `ditforge export`, `build` and `repo`, with the seconds, bytes and peak of resident memory of each.
serve: from the start of `ditforge serve` to its first picture; pictures one at a time; what serving adds to a step,
    which is the step as the client sees it less what Triton says that the DiT's model took; and GPU memory.
clients: pictures a minute of 1, 2, 4 and 8 clients at once.
bench: `ditforge bench`, each engine by itself, so that what serving adds can also be told from the engine alone.
caps: cards of less memory, imitated by a neighbour on the GPU (see gpu_memory.py). Each gets a build of its own, which
    starts with the engines that are there, and pictures in a row; their peak stands beside that of `ditforge plan`.
diffusers: its own pipeline, on the GPU and under the same caps (see gpu_diffusers.py).

A measurement that fails or takes too long is a row that says so, and the next one is made. After `--budget` seconds no
other is begun, and a command that still runs is ended: the next run takes an export up where it was, but begins a build
anew. Results are in the file from the moment they are known, with a Markdown table beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path

from gpu_diffusers import OFFLOADING, UNCAPPED, measure_diffusers
from gpu_memory import Gpu, Neighbour, has_gpu, neighbour, usable, watching
from gpu_run import GIB, Ran, Results, Row, ditforge, size_of, versions_of
from gpu_served import Server, connected, make, served, serving
from gpu_table import report
from made_up import write_calibration

from ditforge import local_gpu, manifest
from ditforge.contract import DIT, TOKENIZER
from ditforge.errors import DitforgeError
from ditforge.export.checkpoint.source import CheckpointSource, opened
from ditforge.export.families import read_networks
from ditforge.export.graph.tracing import dry_run
from ditforge.export.quantisation.precision import parse_precision

STAGES = ("make", "serve", "clients", "bench", "caps", "diffusers")
CARDS, CLIENTS = (24.0, 16.0, 12.0, 8.0), (1, 2, 4, 8)
LARGE = 10**9  # bytes; of an export's files, `--lean` deletes those that are larger, once engines are built
FEW = 3  # pictures after which a server that has made none is given up
NOTED = 10  # pictures after which what is known is written
LIKE = "rtx4090"  # the card that `ditforge plan` plans for on a machine without a GPU
PACKAGES = ("ditforge", "torch", "diffusers", "transformers", "onnxruntime-gpu", "onnxruntime", "nvidia-pytriton")


def names_of(text: str) -> list[str]:
    """The words of a list with commas."""
    return [part for part in text.split(",") if part]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a published model such as flux.1-dev, or a folder in diffusers' layout")
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--t5-precision", help="of T5 alone, such as int8-weights")
    parser.add_argument("--compiler", default="inductor")
    parser.add_argument("--gpu", help="local, which is the default, or cpu")
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--only", type=names_of, default=list(STAGES), help=f"of {','.join(STAGES)}")
    parser.add_argument("--folder", type=Path, default=Path("out/gpu-pipeline"))
    parser.add_argument(
        "--lean", action="store_true", help="delete the large files of the export once engines are built"
    )
    parser.add_argument("--budget", type=float, default=3600, help="seconds after which no measurement is begun")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--one-at-a-time", type=int, default=5, help="pictures of the stage serve")
    parser.add_argument("--clients", type=names_of, default=[str(count) for count in CLIENTS])
    parser.add_argument("--each", type=int, default=2, help="pictures of each client")
    parser.add_argument("--cards", type=names_of, default=[f"{card:g}" for card in CARDS], help="GiB of each")
    parser.add_argument("--pictures", type=int, default=50, help="in a row, for each card")
    parser.add_argument("--card-seconds", type=float, default=900, help="that the pictures of a card may take")
    parser.add_argument("--diffusers", type=names_of, default=[*UNCAPPED, *OFFLOADING])
    parser.add_argument("--diffusers-steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/pipeline.json"))
    given = parser.parse_args()
    if unknown := set(given.only) - set(STAGES):
        parser.error(f"--only takes {','.join(STAGES)}, not {','.join(sorted(unknown))}")
    if unknown := set(given.diffusers) - {*UNCAPPED, *OFFLOADING}:
        parser.error(f"--diffusers takes {','.join((*UNCAPPED, *OFFLOADING))}, not {','.join(sorted(unknown))}")
    if given.gpu is None and not has_gpu():
        parser.error("this machine has no GPU; --gpu cpu rehearses, for which a small model should be taken")
    given.gpu = given.gpu or "local"
    return given


def machine(given: argparse.Namespace) -> Row:
    """What the figures were measured on, with what, and when."""
    found: Row = {"gpu": "none"}
    if has_gpu():
        gpu = local_gpu.local_gpus()[0]
        found = {"gpu": gpu.product, "capability": gpu.capability, "driver": gpu.driver, "gpu_gib": gpu.memory / GIB}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return found | {
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "python": platform.python_version(),
        "versions": versions_of(PACKAGES),
        "date": str(date.today()),
        "model": given.model,
        "precision": given.precision,
        "compiler": given.compiler,
        "side": given.side,
        "command": "python benchmarks/gpu_pipeline.py " + " ".join(sys.argv[1:]),
    }


def make_up_calibration(model: str, file: Path) -> None:
    """Write a calibration with the same range for every linear of the DiT that may be in 8 bits."""
    with opened(CheckpointSource(Path(model), random_weights=True)) as checkpoint:
        known, _, networks = read_networks(checkpoint, parse_precision("bf16"))
        dit = next(network for network in networks if network.name == DIT)
        linears = [names[0] for names, _ in dry_run(dit) if any(map(dit.may_be_8_bit, names))]
        write_calibration(known.name, checkpoint, linears, file)


def is_there(folder: Path) -> bool:
    """Whether a stage has written the folder. They appear whole or not at all."""
    return (folder / manifest.FILE_NAME).is_file()


class Pipeline:
    """The commands and folders of one run."""

    def __init__(self, given: argparse.Namespace, results: Results, gpu: Gpu | None) -> None:
        self.given, self.results, self.gpu = given, results, gpu
        self.folder: Path = given.folder.absolute()
        self.onnx, self.engines, self.repo = (self.folder / name for name in ("onnx", "engines", "repo"))
        self.logs = self.folder / "logs"
        self.steps: int = given.steps
        self.latest = self.engines  # where the next card's build finds engines; a tile's are there from the card before

    def run(self, name: str, arguments: list[str]) -> Ran:
        """Run a command of ditforge within the time that is left."""
        return ditforge(arguments, self.logs / f"{name}.log", max(self.results.left, 1))

    def step(self, name: str, out: Path, arguments: list[str]) -> None:
        """Run a command that writes the folder `out`, unless it is there."""
        if is_there(out):
            print(f"{out} is there", flush=True)
            return

        def measure() -> None:
            ran = self.run(name, [*arguments, "--out", str(out)])
            size = size_of(out)
            self.results.note(name, command=ran.command, seconds=ran.seconds, bytes=size, peak_gib=ran.peak / GIB)

        self.results.attempted(name, measure)

    def make(self) -> None:
        """Export, build, and write the repository."""
        given = self.given
        arguments = ["export", given.model, "--random-weights", "--precision", given.precision]
        if given.t5_precision:
            arguments += ["--t5-precision", given.t5_precision]
        if given.precision == "fp8" and not is_there(self.onnx):
            ranges = self.folder / "calibration.json"
            if not ranges.is_file():
                make_up_calibration(given.model, ranges)
            arguments += ["--calibration", str(ranges)]
        self.step("export", self.onnx, arguments)
        if not is_there(self.onnx):
            return
        self.step("build", self.engines, self.build_arguments())
        if is_there(self.engines) and given.lean:
            for file in self.onnx.iterdir():
                if file.is_file() and file.stat().st_size > LARGE:
                    file.unlink()
                    print(f"deleted {file}", flush=True)
        if is_there(self.engines):
            self.step("repo", self.repo, ["repo", str(self.engines)])

    def build_arguments(self) -> list[str]:
        """The build of the export for pictures of one size, one at a time."""
        model = manifest.read(self.onnx, "onnx").model
        batch = 2 if model.guidance == "classifier-free" else 1
        given, size = self.given, f"{self.given.side}x{self.given.side}"
        arguments = ["build", str(self.onnx), "--gpu", given.gpu, "--compiler", given.compiler]
        return [*arguments, "--static", size, "--batch", str(batch), "--json"]

    def serve(self) -> None:
        """The stages on a server: pictures one at a time, and of several clients."""
        given = self.given
        counts = [int(count) for count in given.clients]
        self.results.attempted(
            "served",
            lambda: served(
                self.repo, self.results, self.gpu, self.logs / "serve.log", set(given.only), self.steps,
                given.one_at_a_time, counts, given.each,
            ),
        )  # fmt: skip

    def bench(self) -> None:
        """Each engine by itself."""

        def measure() -> None:
            ran = self.run("bench", ["bench", str(self.engines), "--json"])
            found = json.loads(ran.output)
            kept = ("ms", "least_ms", "most_ms", "load_s", "gpu_memory")
            timings = {one["component"]: {key: one[key] for key in kept} for one in found["timings"]}
            self.results.note("bench", seconds=ran.seconds, models=timings, picture_s=found["picture_s"])
            seen = self.results.rows.get("one at a time", {}).get("step_ms")
            if seen and DIT in timings:
                adds = seen - timings[DIT]["ms"]
                self.results.note("bench", serving_adds_ms=adds, serving_adds_percent=100 * adds / timings[DIT]["ms"])

        self.results.attempted("bench", measure)

    def plan(self, card: float) -> Row:
        """What `ditforge plan` says of the export on a card of so many GiB."""
        name = LIKE if self.gpu is None else "local"
        given = ["--compiler", self.given.compiler, "--size", str(self.given.side), "--json"]
        ran = self.run(f"plan-{card:g}", ["plan", str(self.onnx), "--gpu", name, "--gpu-memory", f"{card:g}", *given])
        fit = json.loads(ran.output)["gpus"][0]["sizes"][0]
        return {"strategy": fit["strategy"], "vae_tile": fit["vae_tile"], "plan_gib": fit["peak"] / GIB} | {
            "usable_gib": fit["usable"] / GIB,
            "phases_gib": {name: size / GIB for name, size in fit["peaks"].items()},
        }

    def build_for(self, card: float) -> Path:
        """Build the export for a card, with the engines that are there, and return the repository."""
        name = f"{card:g} GiB"
        engines, repo = (self.folder / f"{stage}-{card:g}" for stage in ("engines", "repo"))
        self.results.note(name, card=card, **self.plan(card))
        if not is_there(repo):
            shutil.rmtree(engines, ignore_errors=True)
            shutil.copytree(self.latest, engines, copy_function=os.link)
            memory = [] if self.gpu is None else ["--gpu-memory", f"{card:g}"]
            built = self.run(f"build-{card:g}", [*self.build_arguments(), *memory, "--out", str(engines)])
            compiled = {one["name"]: one["reason"] for one in json.loads(built.output)["engines"] if not one["kept"]}
            self.results.note(name, build_s=built.seconds, compiled=compiled)
            self.latest = engines
            ran = self.run(f"repo-{card:g}", ["repo", str(engines), "--out", str(repo)])
            self.results.note(name, repo_s=ran.seconds)
        found = manifest.read(repo, "repository").engines
        places = {name: engine.placement.model_dump(exclude_defaults=True) for name, engine in found.items()}
        self.results.note(name, placements={name: place for name, place in places.items() if name != TOKENIZER})
        return repo

    def card(self, card: float, beside: Neighbour | None) -> None:
        """Pictures in a row on a card of so many GiB, and the memory that they take at their peak."""
        name, given = f"{card:g} GiB", self.given
        repo = self.build_for(card)
        if beside:
            beside.leave(usable(card))
            self.results.note(name, left_gib=beside.gpu.free / GIB)
        else:
            self.results.note(name, cap="none: there is no GPU, and so no neighbour")
        before = beside.taken if beside else 0
        with watching(self.gpu, before) as watch:
            try:
                with serving(repo, self.logs / f"serve-{card:g}.log", self.results.left) as server:
                    self.results.note(name, ready_s=server.ready)
                    if watch:
                        self.results.note(name, start_gib=watch.peak / GIB)
                        watch.again()
                    self.in_a_row(name, server)
            finally:
                if watch:
                    peak = max(watch.peak / GIB, self.results.rows[name].get("start_gib", 0.0))
                    of_plan = peak / self.results.rows[name]["plan_gib"]
                    self.results.note(name, pictures_gib=watch.peak / GIB, peak_gib=peak, of_plan=of_plan)
                if given.lean:
                    shutil.rmtree(repo)

    def in_a_row(self, name: str, server: Server) -> None:
        """Pictures one after the other, until their time is over, or the first few have all failed."""
        given = self.given
        seconds: list[float] = []
        step_ms: list[float] = []
        failures: list[str] = []
        with connected(server, self.results) as client:
            began = time.perf_counter()
            for number in range(given.pictures):
                over = time.perf_counter() - began > given.card_seconds or self.results.left <= 0
                if (number and over) or (len(failures) >= FEW and not seconds):
                    break
                try:
                    picture = make(client, number, self.steps)
                except DitforgeError as error:
                    failures.append(f"{number}: {error}"[:300])
                else:
                    seconds.append(picture.seconds)
                    step_ms += picture.step_ms
                row: Row = {"pictures": len(seconds), "asked": given.pictures, "failures": failures}
                if seconds:
                    row |= {"first_s": seconds[0], "median_s": statistics.median(seconds), "most_s": max(seconds)}
                if step_ms:
                    row |= {"step_ms": statistics.median(step_ms)}
                if number % NOTED == 0:
                    self.results.note(name, **row)
        self.results.note(name, **row)

    def caps(self) -> None:
        """All cards, the largest first. The neighbour holds nothing while engines of a tile's size are compiled."""
        for card in sorted(map(float, self.given.cards), reverse=True):

            def measure(card: float = card) -> None:
                with neighbour(self.gpu, self.logs / "neighbour.log") as beside:
                    self.card(card, beside)

            self.results.attempted(f"{card:g} GiB", measure)


def run(given: argparse.Namespace, results: Results) -> None:
    """The stages that are asked for, in their order."""
    gpu = Gpu() if given.gpu != "cpu" else None
    pipeline = Pipeline(given, results, gpu)
    if "make" in given.only:
        results.attempted("calibration", pipeline.make)
    if {"serve", "clients"} & set(given.only):
        pipeline.serve()
    if "bench" in given.only:
        pipeline.bench()
    if "caps" in given.only:
        pipeline.caps()
    if "diffusers" in given.only:
        cards = [float(card) for card in given.cards]
        model, side, steps = given.model, given.side, given.diffusers_steps
        results.attempted(
            "diffusers",
            lambda: measure_diffusers(
                results, gpu, model, side, steps, given.steps, cards, given.diffusers, pipeline.logs
            ),
        )


def main() -> None:
    """Measure what the arguments ask for."""
    given = parse()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    given.folder.mkdir(parents=True, exist_ok=True)
    kept, table = given.folder / "pipeline.json", given.out.with_suffix(".md")
    rows = json.loads(kept.read_text()) if kept.is_file() else {}
    results = Results((kept, given.out), time.monotonic() + given.budget, rows)
    results.changed = partial(report, table)
    before = rows.get("machine", {})
    commands = [*before.get("commands", []), machine(given)["command"]]
    results.note("machine", **machine(given), commands=commands)
    try:
        run(given, results)
    except subprocess.SubprocessError as error:
        results.note("machine", ended=str(error))
        raise
    print(table.read_text(), flush=True)


if __name__ == "__main__":
    main()
