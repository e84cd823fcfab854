"""Pictures of the small models on this machine's GPU, through Triton and the engine process, and what faults do there.

    python benchmarks/gpu_chain.py reference models/flux-tiny models/sd35-tiny --out out/reference
    python benchmarks/gpu_chain.py run models/flux-tiny models/sd35-tiny --reference out/reference --out out/chain.json

`reference`, on any machine, writes the pictures of engines on the CPU, and the ranges that FP8 needs. `run`, on a
machine with a GPU, exports each model in each precision, builds, serves, and makes the same pictures of held-out
captions with the same seeds; the judge scores both. Then it breaks things: the engine process is killed in the middle
of pictures, another program takes the GPU's memory before the server starts and while it serves, and an engine's file
is cut short. Each has to end in a clear error for whoever it meets, and the next good picture has to come.
gpu_engines.py does the same with engines that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from gpu_memory import Gpu, neighbour
from gpu_run import Failed, Results, ditforge
from gpu_served import Server, milliseconds, serving, statistics_of
from numpy.typing import NDArray

from ditforge.client import Client
from ditforge.contract import DIT

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from judge import judge
from scenes import caption, held_out_captions, training_scenes

SEED, STEPS = 2026, 20
CAPTIONS = 200
FEW_CAPTIONS = 24  # where engines are loaded for each call
TOGETHER = 3  # pictures of one call, of SIZE, which no model is trained for
SIZE = "160x128"
CALIBRATION_PROMPTS = 64
MIB = 2**20
PROCESS = "ditforge.engines.runtime.process"
# The activations that each compiler wants around FP8 (docs/onnxruntime.md).
VARIANTS = {
    "inductor": (("bf16", None), ("fp8", "bf16")),
    "onnxruntime": (("bf16", None), ("fp8", "fp16")),
}
SIZES = ("--resolutions", "64-128-256", "--batch", "4")
FIXED = ("--static", "128x128", "--batch", "4")
STARTING = 240.0  # seconds within which a server is ready
COMMAND_SECONDS = 500.0  # that a command may take


@dataclass(frozen=True)
class Case:
    """A model in one precision, for one compiler."""

    checkpoint: Path
    compiler: str
    precision: str
    activations: str | None

    @property
    def export(self) -> str:
        """The name of its export, which cases with other compilers may share."""
        return f"{self.checkpoint.name}-{self.precision}" + (f"-{self.activations}" if self.activations else "")

    @property
    def name(self) -> str:
        """Its name in the results."""
        return f"{self.export} {self.compiler}"


@dataclass(frozen=True)
class Served:
    """A repository in `folder`/repo: the name of its model, its precision, and whether its engines are resident."""

    model: str
    precision: str
    folder: Path
    resident: bool = True

    @property
    def repository(self) -> Path:
        """The repository."""
        return self.folder / "repo"


def engine_processes(server: Server) -> list[int]:
    """The process ids of a server's engine processes."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if PROCESS.encode() in words and descends(int(folder.name), server.pid):
                    found.append(int(folder.name))
    return found


def descends(process: int, ancestor: int) -> bool:
    """Return whether a process is a child of another one, or a child's child, and so on."""
    while process > 1 and process != ancestor:
        process = int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
    return process == ancestor


def run(log: Path, *arguments: object) -> None:
    """Run a command of ditforge. Raises Failed with the end of what it said if it fails."""
    ditforge([str(argument) for argument in arguments], log, COMMAND_SECONDS)


def pictures(url: str, captions: list[str]) -> NDArray[np.uint8]:
    """A picture for each caption, [N, H, W, 3]; seeds count up from SEED."""
    with Client(url) as client:
        return np.stack([np.asarray(image) for image in client.generate(captions, seed=SEED, steps=STEPS)])


def score(images: NDArray[np.uint8], captions: list[str]) -> float:
    """How many captions are right by the judge, in percent."""
    from PIL import Image

    right = sum(judge(Image.fromarray(image), text).correct for image, text in zip(images, captions, strict=True))
    return 100 * right / len(captions)


def distance(images: NDArray[np.uint8], others: NDArray[np.uint8]) -> dict[str, Any]:
    """How far pictures are from others: the largest difference of 255 levels, and PSNR in dB, mean and worst."""
    difference = np.abs(images.astype(np.int16) - others)
    squares = (difference.astype(np.float64) ** 2).mean(axis=(1, 2, 3))
    psnr = np.minimum(60.0, 10 * np.log10(255**2 / np.maximum(squares, 1e-9)))
    return {
        "largest": int(difference.max()),
        "differ_by_more_than_1_percent": float(100 * (difference > 1).mean()),
        "psnr": float(psnr.mean()),
        "psnr_worst": float(psnr.min()),
    }


def write_reference(checkpoints: list[Path], out: Path) -> None:
    """Write NAME.npz with the pictures of fp32 and fp8 on the CPU, and NAME.json with the ranges for fp8."""
    captions = held_out_captions(CAPTIONS, SEED)
    out.mkdir(parents=True, exist_ok=True)
    for checkpoint in checkpoints:
        ranges, work = out / f"{checkpoint.name}.json", out / "work" / checkpoint.name
        work.mkdir(parents=True, exist_ok=True)
        wording = random.Random(SEED)
        prompts = work / "prompts.txt"
        prompts.write_text("".join(f"{caption(s, wording)}\n" for s in training_scenes(CALIBRATION_PROMPTS, SEED)))
        run(work / "calibrate.log", "calibrate", checkpoint, "--prompts", prompts, "--steps", STEPS, "--out", ranges)
        made = {}
        for precision, more in (("fp32", ()), ("fp8", ("--activations", "fp32", "--calibration", ranges))):
            folder = work / precision
            run(folder / "export.log", "export", checkpoint, "--precision", precision, *more, "--out", folder / "onnx")
            run(folder / "build.log", "build", folder / "onnx", "--gpu", "cpu", "--out", folder / "engines")
            run(folder / "repo.log", "repo", folder / "engines", "--out", folder / "repo")
            with serving(folder / "repo", folder / "log", STARTING) as server:
                made[precision] = pictures(server.url, captions)
            print(checkpoint.name, precision, score(made[precision], captions), flush=True)
        np.savez_compressed(out / f"{checkpoint.name}.npz", **made)


def measure_case(served: Served, reference: Path, gpu: Gpu | None) -> dict[str, Any]:
    """Serve a repository, and compare its pictures with the CPU's."""
    captions = held_out_captions(CAPTIONS, SEED)[: CAPTIONS if served.resident else FEW_CAPTIONS]
    expected = {name: all_of[: len(captions)] for name, all_of in np.load(reference / f"{served.model}.npz").items()}
    before = gpu.used if gpu else 0
    with serving(served.repository, served.folder / "log", STARTING) as server:
        taken = gpu.used - before if gpu else 0
        with Client(server.url) as client:
            client.generate(captions[0], seed=SEED, steps=STEPS)
            times, told = [], statistics_of(server.url)
            for _ in range(5):
                begun = time.perf_counter()
                client.generate(captions[0], seed=SEED, steps=STEPS)
                times.append(1000 * (time.perf_counter() - begun))
            dit = milliseconds(told, statistics_of(server.url))[DIT]
            together = None if client.model.sizes else difference_together(client, captions[:TOGETHER])
        begun = time.perf_counter()
        images = pictures(server.url, captions)
        seconds = time.perf_counter() - begun
        afterwards = gpu.used - before if gpu else 0
        processes = len(engine_processes(server))
    own = score(images, captions)
    exact = score(expected["fp32"], captions)
    same = score(expected["fp8"], captions) if served.precision == "fp8" else exact
    return {
        "ready_s": round(server.ready, 1),
        "picture_ms": round(float(np.median(times)), 1),
        "dit_ms": dit["compute_infer"],
        "all_s": round(seconds, 1),
        "pictures": len(captions),
        "engine_processes": processes,
        "gpu_mib": taken // MIB,
        "gpu_mib_afterwards": afterwards // MIB,
        "score": own,
        "cpu_fp32_score": exact,
        "cpu_same_precision_score": same,
        "within_1_point": abs(own - same) <= 1.0,
        "together_and_alone_differ_by": together,
        **distance(images, expected["fp32"]),
    }


def difference_together(client: Client, captions: list[str]) -> int:
    """How many of 255 levels pictures of SIZE differ that are made in one call, and one after the other."""
    many = client.generate(captions, seed=SEED, steps=STEPS, size=SIZE)
    alone = [client.generate(text, seed=SEED + place, steps=STEPS, size=SIZE) for place, text in enumerate(captions)]
    pairs = zip(many, alone, strict=True)
    return max(int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max()) for a, b in pairs)


@contextlib.contextmanager
def filled(gpu: Gpu | None, log: Path, left: int) -> Iterator[None]:
    """Another program that leaves so many bytes of the GPU's memory free. Raises Failed where there is no GPU."""
    if gpu is None:
        raise Failed("there is no GPU to fill")
    with neighbour(gpu, log.with_suffix(".neighbour")) as beside:
        assert beside
        beside.leave(left)
        yield


def one(client: Client, **options: Any) -> NDArray[np.int16]:
    """The same small picture each time."""
    return np.asarray(client.generate("a large red circle", seed=1, steps=8, **options), np.int16)


def failing(call: Callable[[], Any]) -> str:
    """What a call raises, in one line; empty if it goes through."""
    try:
        call()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return ""


def killed_process(repository: Path, log: Path, gpu: Gpu | None) -> dict[str, Any]:
    """Kill the engine process three times while four clients make pictures: all have to arrive, and be the same."""
    with serving(repository, log, STARTING) as server, Client(server.url) as client:
        expected = one(client)
        wrong, errors, done = 0, list[str](), 0
        ended = threading.Event()

        def work() -> None:
            nonlocal wrong, done
            with Client(server.url) as own:
                while not ended.is_set():
                    try:
                        wrong += int(np.abs(one(own) - expected).max()) > 1
                        done += 1
                    except Exception as error:
                        errors.append(" ".join(str(error).split())[:200])

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(work)
            processes, recovered = [], list[float]()
            for _ in range(3):
                time.sleep(2)
                victims = engine_processes(server)
                processes.append(len(victims))
                for victim in victims:
                    os.kill(victim, signal.SIGKILL)
                begun = time.perf_counter()
                one(client)
                recovered.append(round(time.perf_counter() - begun, 2))
            time.sleep(2)
            ended.set()
        said = killed_in_a_call(server)
        after = int(np.abs(one(client) - expected).max())
        return {
            "processes_each_time": processes, "pictures": done, "wrong": wrong, "errors": errors[:5],
            "error_of_a_client_that_does_not_retry": said,
            "picture_after_a_kill_s": recovered, "difference_at_the_end": after,
            "good": not wrong and not errors and after <= 1 and processes == [1, 1, 1],
        }  # fmt: skip


def killed_in_a_call(server: Server) -> str:
    """What a client that does not try again is told when the process is killed; empty if no call was in it then."""
    with Client(server.url, retry_timeout=0) as client, ThreadPoolExecutor(1) as pool:
        many = pool.submit(failing, lambda: [one(client) for _ in range(20)])
        time.sleep(0.3)
        for victim in engine_processes(server):
            os.kill(victim, signal.SIGKILL)
        return many.result()


def full_while_serving(repository: Path, log: Path, gpu: Gpu | None) -> dict[str, Any]:
    """Another program takes nearly all memory while the server runs: what needs more fails with an error."""
    with serving(repository, log, STARTING) as server, Client(server.url) as client:
        expected = one(client, size="64x64")
        with filled(gpu, log, 16 * MIB):
            prompts = ["a large red circle"] * 4
            said = failing(lambda: client.generate(prompts, seed=1, steps=2, size="256x256"))
            small = failing(lambda: one(client, size="64x64"))
        after = int(np.abs(one(client, size="64x64") - expected).max())
        large = failing(lambda: client.generate(prompts, seed=1, steps=2, size="256x256"))
        return {
            "error": said, "small_picture_meanwhile": small or "made", "difference_afterwards": after,
            "large_afterwards": large or "made", "processes": len(engine_processes(server)),
            "good": after <= 1 and not large,
        }  # fmt: skip


def full_at_start(repository: Path, log: Path, gpu: Gpu | None) -> dict[str, Any]:
    """Another program has nearly all memory when the server starts: it ends with an error, and starts afterwards."""

    def start() -> None:
        with serving(repository, log, STARTING):
            pass

    with filled(gpu, log, 300 * MIB):
        said = failing(start)
    after = failing(start)
    return {"error": said, "afterwards": after or "ready", "good": bool(said) and not after}


def cut_file(repository: Path, log: Path, gpu: Gpu | None) -> dict[str, Any]:
    """An engine's largest file is cut short, and a repository of it served: that ends with an error that names it."""
    copy = repository.with_name("cut")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(repository, copy)
    largest = max((path for path in copy.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)

    def start() -> None:
        with serving(copy, log, STARTING):
            pass

    said = failing(start)
    return {"file": str(largest.relative_to(copy)), "error": said, "good": largest.name in said}


Fault = Callable[[Path, Path, Gpu | None], dict[str, Any]]
FAULTS: tuple[Fault, ...] = (killed_process, full_while_serving, full_at_start, cut_file)


def run_all(args: argparse.Namespace) -> None:
    """Everything on the GPU."""
    results, folder = Results((args.out,), time.monotonic() + args.budget), args.folder
    gpu = None if args.gpu == "cpu" else Gpu()
    results.note("machine", **machine(args.gpu))
    cases = [
        Case(checkpoint, compiler, precision, activations)
        for compiler in args.compilers
        for checkpoint in args.checkpoints
        for precision, activations in VARIANTS[compiler]
    ]

    def export(case: Case) -> dict[str, Any]:
        begun = time.perf_counter()
        more: list[object] = ["--activations", case.activations] if case.activations else []
        if case.precision == "fp8":
            more += ["--calibration", args.reference / f"{case.checkpoint.name}.json"]
        run(
            folder / f"{case.export}.log",
            "export",
            case.checkpoint,
            "--precision",
            case.precision,
            *more,
            "--out",
            folder / case.export,
        )
        return {"export_s": round(time.perf_counter() - begun, 1)}

    def build(case: Case) -> dict[str, Any]:
        begun = time.perf_counter()
        dynamic = case.precision == "bf16" and case.checkpoint == args.checkpoints[0]
        sizes = SIZES if dynamic or case.compiler == "onnxruntime" else FIXED
        target = ("--gpu", args.gpu, "--compiler", case.compiler)
        run(
            folder / f"{case.name}.log",
            "build",
            folder / case.export,
            *target,
            *sizes,
            "--out",
            folder / case.name / "engines",
        )
        run(folder / f"{case.name}.log", "repo", folder / case.name / "engines", "--out", folder / case.name / "repo")
        return {"sizes": " ".join(sizes), "build_s": round(time.perf_counter() - begun, 1)}

    def attempt(name: str, measure: Callable[..., dict[str, Any]], *given: Any) -> None:
        results.attempted(name, lambda: results.note(name, **measure(*given)))

    with ThreadPoolExecutor(args.at_once) as pool:
        exports = {case.export: case for case in cases}
        list(pool.map(lambda case: attempt(f"{case.export} export", export, case), exports.values()))
        list(pool.map(lambda case: attempt(f"{case.name} build", build, case), cases))
    for case in cases:
        served = Served(case.checkpoint.name, case.precision, folder / case.name)
        attempt(case.name, measure_case, served, args.reference, gpu)
    for compiler in args.compilers:
        work = folder / next(case.name for case in cases if case.compiler == compiler)
        break_all(results, compiler, work, gpu)


def break_all(results: Results, compiler: str, work: Path, gpu: Gpu | None) -> None:
    """Every fault, with the repository in the folder `work`."""
    for fault in FAULTS:
        log = work / f"{fault.__name__}.log"

        def attempt(fault: Fault = fault, log: Path = log) -> None:
            results.note(f"{compiler}: {said_of(fault)}", **fault(work / "repo", log, gpu))

        results.attempted(f"{compiler}: {said_of(fault)}", attempt)


def said_of(fault: Fault) -> str:
    """The name of a fault, in words."""
    return fault.__name__.replace("_", " ")


def machine(gpu: str) -> dict[str, str]:
    """What it runs on."""
    found = {"date": str(date.today()), "python": sys.version.split()[0]}
    if gpu == "cpu":
        return {**found, "gpu": "none: the CPU"}
    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    name, driver = told.stdout.splitlines()[0].split(", ")
    return {**found, "gpu": name, "driver": driver}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    reference, everything = commands.add_parser("reference"), commands.add_parser("run")
    for command in (reference, everything):
        command.add_argument("checkpoints", type=Path, nargs="+")
        command.add_argument("--out", type=Path, required=True)
    everything.add_argument("--reference", type=Path, required=True)
    everything.add_argument("--compilers", type=lambda text: text.split(","), default=list(VARIANTS))
    everything.add_argument("--gpu", default="local", help="cpu shows on any machine whether this script works")
    everything.add_argument("--folder", type=Path, default=Path("out/gpu-chain"))
    everything.add_argument("--budget", type=float, default=3600, help="seconds after which nothing is begun")
    everything.add_argument("--at-once", type=int, default=2, help="how many exports and builds run at a time")
    args = parser.parse_args()
    args.checkpoints = [checkpoint.resolve() for checkpoint in args.checkpoints]
    if args.command == "reference":
        write_reference(args.checkpoints, args.out)
    else:
        run_all(args)


if __name__ == "__main__":
    main()
