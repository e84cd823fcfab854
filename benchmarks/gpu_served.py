"""Pictures through `ditforge serve` and the client: from its start on, one at a time, and from several clients."""

from __future__ import annotations

import contextlib
import hashlib
import re
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gpu_memory import Gpu, processes, watching
from gpu_run import GIB, LOOK, Failed, Results, Row, end, in_memory, started, why
from tritonclient.grpc import InferenceServerClient

from ditforge.client import Client
from ditforge.contract import DIT
from ditforge.errors import DitforgeError

PROMPT = "a large red circle above a small blue square on a white background"
SERVING = re.compile(r"^serving .+ at (\S+) \(", re.MULTILINE)
STARTING = 400.0  # seconds that a server may take to be ready
FEW_STEPS = 8  # of the pictures from whose seconds those of a step are derived
STUCK = 120.0  # seconds of one call after which it counts as failed
PARTS = ("queue", "compute_input", "compute_infer", "success")


@dataclass(frozen=True)
class Server:
    """A server that is ready: its address, its process id, when it was started, and the seconds until it was ready."""

    url: str
    pid: int
    began: float
    ready: float


@dataclass(frozen=True)
class Picture:
    """A picture: its seconds, the milliseconds from each step to the next, its SHA-256, and how even it is.

    `levels` is how many different values its pixels have: 1 where the decoder gave NaN everywhere.
    """

    seconds: float
    step_ms: tuple[float, ...]
    sha256: str
    levels: int


@contextlib.contextmanager
def serving(repository: Path, log: Path, seconds: float) -> Iterator[Server]:
    """A server of `repository` on a free port. Raises Failed if it is not ready in time."""
    said, errors = log.with_suffix(".out"), log.with_suffix(".err")  # Triton's own log is `log`
    said.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "ditforge", "serve", str(repository), "--port", "0", "--grace", "2"]
    limit = min(STARTING, seconds)
    print("$ ditforge", *command[3:], flush=True)
    began = time.perf_counter()
    with said.open("wb") as output:
        process = started(
            [*command, "--log", str(log), "--timeout", f"{limit:.0f}"], errors, stdout=output, stdin=subprocess.DEVNULL
        )
    try:
        while not (found := SERVING.search(said.read_text(errors="replace"))):
            if process.poll() is not None:
                raise Failed(f"the server ended with {process.returncode}: {why(errors)}")
            if time.perf_counter() - began > limit:
                raise Failed(f"the server was not ready within {limit:.0f} s: {why(errors)}")
            time.sleep(LOOK / 5)
        yield Server(found[1], process.pid, began, time.perf_counter() - began)
    finally:
        end(process)


def connected(server: Server, results: Results) -> Client:
    """A client that gives up when the time is over, and soon if the server fails."""
    return Client(server.url, timeout=max(results.left, 60), step_timeout=STUCK, retry_timeout=10)


def make(client: Client, seed: int, steps: int) -> Picture:
    """One picture of the server's own size. Raises DitforgeError if a call fails, or if its latents are not finite."""
    times: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a picture of one colour, which `levels` tells
        began = time.perf_counter()
        image = client.generate(PROMPT, seed=seed, steps=steps, callback=lambda step: times.append(time.perf_counter()))
        seconds = time.perf_counter() - began
    pixels = np.asarray(image)
    between = tuple(1e3 * float(ms) for ms in np.diff(times))
    return Picture(seconds, between, hashlib.sha256(pixels.tobytes()).hexdigest(), len(np.unique(pixels)))


def statistics_of(url: str) -> dict[str, Row]:
    """Triton's statistics of each model by name: its calls that went well, and the nanoseconds of each part of them."""
    with InferenceServerClient(url) as client:
        found = client.get_inference_statistics(as_json=True).get("model_stats", [])
    times = {model["name"]: model.get("inference_stats", {}) for model in found}
    return {
        name: {"calls": int(parts.get("success", {}).get("count", 0))}
        | {part: int(parts.get(part, {}).get("ns", 0)) for part in PARTS}
        for name, parts in times.items()
    }


def milliseconds(before: Mapping[str, Row], after: Mapping[str, Row]) -> dict[str, Row]:
    """What each model took between two statistics: its calls, and the milliseconds of each part of a call."""
    made = {}
    for name, now in after.items():
        then = before.get(name, dict.fromkeys(now, 0))
        if calls := now["calls"] - then["calls"]:
            made[name] = {"calls": calls} | {part: round((now[part] - then[part]) / calls / 1e6, 3) for part in PARTS}
    return made


def one_at_a_time(server: Server, client: Client, results: Results, steps: int, count: int) -> None:
    """The first picture, then `count` of them, and what the server says that they took."""
    first = make(client, 0, steps)
    since = time.perf_counter() - server.began
    results.note("first picture", seconds_since_start=since, seconds=first.seconds, sha256=first.sha256)
    results.attempted("one at a time", lambda: in_turn(server, client, results, steps, count, first))


def in_turn(server: Server, client: Client, results: Results, steps: int, count: int, first: Picture) -> None:
    """Pictures one after the other: seconds, the step as the client sees it, and what serving adds to it."""
    before = statistics_of(server.url)
    pictures = []
    for number in range(count):
        if number and results.left <= 0:
            break
        pictures.append(make(client, number, steps))
    told = milliseconds(before, statistics_of(server.url))
    seen = [ms for picture in pictures for ms in picture.step_ms]
    seconds = [picture.seconds for picture in pictures]
    row: Row = {
        "pictures": len(pictures),
        "steps": steps,
        "median_s": statistics.median(seconds),
        "least_s": min(seconds),
        "most_s": max(seconds),
        "same_seed_same_picture": pictures[0].sha256 == first.sha256,
        "valid": all(picture.levels > 1 for picture in pictures),
        "models": told,
    }
    if seen:
        row |= {"step_ms": statistics.median(seen), "step_least_ms": min(seen), "step_most_ms": max(seen)}
        if DIT in told:
            adds = row["step_ms"] - told[DIT]["compute_infer"]
            row |= {"serving_adds_ms": adds, "serving_adds_percent": 100 * adds / told[DIT]["compute_infer"]}
    results.note("one at a time", **row)
    if steps > FEW_STEPS and results.left > 0:
        few = statistics.median(make(client, number, FEW_STEPS).seconds for number in range(3))
        derived = 1e3 * (row["median_s"] - few) / (steps - FEW_STEPS)
        results.note("one at a time", few_steps_s=few, step_derived_ms=derived)


def several_clients(server: Server, results: Results, clients: int, steps: int, each: int) -> None:
    """Pictures a minute of so many clients, each of which makes `each` pictures, one after the other."""
    barrier = threading.Barrier(clients + 1)
    seconds: list[float] = []
    errors: list[str] = []

    def run(number: int) -> None:
        try:
            with connected(server, results) as client:
                barrier.wait(60)
                for picture in range(each):
                    seconds.append(make(client, 100 * number + picture, steps).seconds)
        except (DitforgeError, threading.BrokenBarrierError) as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=[number], daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    barrier.wait(60)
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    row: Row = {"clients": clients, "steps": steps, "pictures": len(seconds), "seconds": took, "errors": errors}
    if seconds:
        row |= {"pictures_a_minute": 60 * len(seconds) / took, "median_s": statistics.median(seconds)}
    results.note(f"{clients} clients", **row)


def served(
    repository: Path,
    results: Results,
    gpu: Gpu | None,
    log: Path,
    stages: set[str],
    steps: int,
    pictures: int,
    clients: list[int],
    each: int,
) -> None:
    """Start a server once, and measure on it the stages that are asked for."""
    before = gpu.used if gpu else 0
    results.note("served", files_in_memory=in_memory(repository))
    with watching(gpu, before) as watch, serving(repository, log, results.left) as server:
        results.note("served", ready_s=server.ready)
        if "serve" in stages:
            with connected(server, results) as client:
                results.attempted("first picture", lambda: one_at_a_time(server, client, results, steps, pictures))
        for count in clients if "clients" in stages else []:

            def measure(count: int = count) -> None:
                several_clients(server, results, count, steps, each)

            results.attempted(f"{count} clients", measure)
        if gpu is None or watch is None:
            results.note("served", gpu_memory="not looked at, without a GPU")
            return
        now = (gpu.used - before) / GIB
        results.note("served", gpu_peak_gib=watch.peak / GIB, gpu_gib_at_the_end=now, nvidia_smi=processes())
