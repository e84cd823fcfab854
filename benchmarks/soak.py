"""Three servers, many clients, and processes that are killed all the while: every picture has to arrive, and be right.

python benchmarks/soak.py models/flux-tiny --out docs/soak.md
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from ditforge.client import Client
from ditforge.errors import DitforgeError, DitforgeWarning

PROMPTS = ("a large red circle", "a small blue square on a white background", "a green triangle above a red square")
SEEDS, STEPS = 8, 8
MODEL_EVERY, SERVER_EVERY = 10.0, 20.0  # seconds between kills


@dataclass
class Server:
    """A `ditforge serve` on a port of its own, which is started again on the same one after it was killed."""

    repository: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        command = [sys.executable, "-m", "ditforge", "serve", str(self.repository), "--port", str(self.port)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--log", str(self.log)], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def family(self) -> list[psutil.Process]:
        return list(psutil.Process(self.process.pid).children(recursive=True))

    def models(self) -> list[psutil.Process]:
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if any(word.endswith("/model.py") for word in process.cmdline()):
                    found.append(process)
        return found

    def kill(self) -> None:
        family = self.family()
        self.process.kill()
        self.process.wait()
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()

    @property
    def memory(self) -> int:
        total = 0
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total


@dataclass
class Result:
    """What became of the pictures."""

    seconds: list[float] = field(default_factory=list)
    identical: int = 0
    within_one: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    kills: list[str] = field(default_factory=list)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def make_repository(checkpoint: Path, folder: Path) -> Path:
    for command in (
        ["export", checkpoint, "--out", folder / "onnx"],
        ["build", folder / "onnx", "--gpu", "cpu", "--out", folder / "engines"],
        ["repo", folder / "engines", "--out", folder / "repo"],
    ):
        subprocess.run([sys.executable, "-m", "ditforge", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return folder / "repo"


def wait_until_ready(url: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            Client(url).close()
            return
        except DitforgeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def is_ready(port: int) -> bool:
    """A server that has never been ready ends where a process of it is killed: whoever started it starts it again."""
    try:
        with InferenceServerClient(f"127.0.0.1:{port}") as client:
            return bool(client.is_server_ready(client_timeout=5))
    except InferenceServerException:
        return False


def generate(client: Client, prompt: str, seed: int) -> NDArray[np.int16]:
    return np.asarray(client.generate(prompt, seed=seed, steps=STEPS), np.int16)


def run_client(
    number: int,
    urls: list[str],
    expected: dict[tuple[str, int], NDArray[np.int16]],
    until: float,
    result: Result,
    lock: threading.Lock,
) -> None:
    """Make pictures until the time is over, each compared with the one that was made alone."""
    rng = random.Random(number)
    with Client(rng.sample(urls, len(urls))) as client:
        while time.monotonic() < until:
            prompt, seed = rng.choice(PROMPTS), rng.randrange(SEEDS)
            begun = time.monotonic()
            try:
                difference = np.abs(generate(client, prompt, seed) - expected[prompt, seed]).max()
            except DitforgeError as error:
                with lock:
                    result.errors[error.problem] += 1
                continue
            with lock:
                result.seconds.append(time.monotonic() - begun)
                result.identical += int(difference == 0)
                result.within_one += int(difference == 1)
                result.wrong += int(difference > 1)


def kill_now_and_then(servers: list[Server], until: float, result: Result) -> None:
    """Every 10 s the process of a model of one of the servers, every 20 s a whole server, which is started again.

    Of servers that are only about to be ready, no process is killed.
    """
    rng, begun = random.Random(0), time.monotonic()
    tick = 0
    while time.monotonic() < until - 5:
        tick += 1
        time.sleep(max(begun + tick * MODEL_EVERY - time.monotonic(), 0))
        server = rng.choice([one for one in servers if is_ready(one.port)] or servers)
        if models := server.models():
            victim = rng.choice(models)
            with contextlib.suppress(psutil.Error):
                name = Path(next(w for w in victim.cmdline() if w.endswith("/model.py"))).parents[1].name
                victim.send_signal(signal.SIGKILL)
                result.kills.append(f"the process of {name}")
        if tick % round(SERVER_EVERY / MODEL_EVERY) == 0:
            server = rng.choice([one for one in servers if one is not server])
            server.kill()
            result.kills.append("a server")
            server.start()


def soak(servers: list[Server], clients: int, seconds: float) -> tuple[Result, list[int], list[int]]:
    """The result, and each server's memory in bytes before and after."""
    urls = [f"127.0.0.1:{server.port}" for server in servers]
    for server in servers:
        server.start()
    for url in urls:
        wait_until_ready(url)
    with Client(urls[0]) as client:
        expected = {(prompt, seed): generate(client, prompt, seed) for prompt in PROMPTS for seed in range(SEEDS)}
    before = [server.memory for server in servers]
    result, lock = Result(), threading.Lock()
    until = time.monotonic() + seconds
    killer = threading.Thread(target=kill_now_and_then, args=(servers, until, result))
    killer.start()

    def count(message: Warning | str, *rest: object, **more: object) -> None:
        if "repeated" in str(message):
            with lock:
                result.repeated += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always", DitforgeWarning)
        warnings.showwarning = count
        with ThreadPoolExecutor(clients) as pool:
            running = [pool.submit(run_client, n, urls, expected, until, result, lock) for n in range(clients)]
            for one in running:
                one.result()
    killer.join()
    for url in urls:
        wait_until_ready(url)
    return result, before, [server.memory for server in servers]


def report(result: Result, clients: int, seconds: float, before: list[int], after: list[int]) -> str:
    """What is written to the file."""
    arrived = len(result.seconds)
    lost = sum(result.errors.values())
    kills = Counter(result.kills)
    ordered = sorted(result.seconds)
    memory = [f"{b >> 20} and {a >> 20}" for b, a in zip(before, after, strict=True)]
    verdict = "met" if not lost and not result.wrong else "MISSED"
    lines = [
        "# Pictures while servers die",
        "",
        "Written by `make soak`.",
        "",
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "",
        f"Three servers of flux-tiny on this machine, {clients} clients that each know all three, {seconds:g} seconds;"
        f" {STEPS} steps a picture. A model's process is ended by SIGKILL every {MODEL_EVERY:g} s, and a whole server,"
        f" which is started again at once, every {SERVER_EVERY:g} s.",
        "",
        "| what | count |",
        "| --- | --- |",
        *(f"| killed: {name} | {count} |" for name, count in sorted(kills.items())),
        f"| pictures that arrived | {arrived} |",
        f"| identical to the one made alone | {result.identical} |",
        f"| within 1 of 255 of it, since a batch rounds differently | {result.within_one} |",
        f"| further from it | {result.wrong} |",
        f"| pictures lost | {lost} |",
        f"| pictures for which calls were repeated | {result.repeated} |",
        "",
        f"Every picture arrives and is right: {verdict}.",
        "",
        f"Seconds a picture: median {statistics.median(ordered):.1f}, 99 of 100 within"
        f" {ordered[int(0.99 * (arrived - 1))]:.1f}, longest {ordered[-1]:.1f}.",
        "",
        f"Memory of the servers in MB before and after: {', '.join(memory)}.",
    ]
    if lost:
        lines += ["", "What was lost:", "", *(f"- {count} times: {what}" for what, count in result.errors.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--repository", type=Path, help="one that exists already")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ditforge-soak-"))
    servers: list[Server] = []
    try:
        repository = arguments.repository or make_repository(arguments.checkpoint, folder)
        servers = [Server(repository, free_port(), folder / f"server-{n}.log") for n in range(3)]
        result, before, after = soak(servers, arguments.clients, arguments.seconds)
        text = report(result, arguments.clients, arguments.seconds, before, after)
        arguments.out.write_text(text)
        print(text)
    finally:
        for server in servers:
            if hasattr(server, "process"):
                server.process.terminate()
                server.process.wait()
    shutil.rmtree(folder)  # not after an error: the servers' logs are in it


if __name__ == "__main__":
    main()
