"""Confirms on a GPU what tests without one cannot: `make gpu-check`. docs/gpu-checklist.md tells what to expect.

    python examples/gpu_check.py models/flux-tiny --out out/gpu-check

Each step is the command that a user would type; the first that does not do what it should ends the check.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from ditforge.engines.compilers.choice import choose
from ditforge.engines.gpus import default_activations, default_precision, find_target
from ditforge.errors import UserError

PROMPT = "a large red circle above a small blue square on a white background"
SIZES = ("--resolutions", "64-128-256")
TOLERANCE = 0.15  # relative error of the velocity in 8 bits, against fp32
COMMAND = [sys.executable, "-m", "ditforge"]


def run(*arguments: str | Path, says: str = "", code: int = 0) -> str:
    """Run a command of ditforge; ends the check unless it exits with `code` and what it prints matches `says`."""
    print("$ ditforge", *arguments, flush=True)
    started = time.perf_counter()
    done = subprocess.run([*COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, f"--- {time.perf_counter() - started:.1f} s", sep="", flush=True)
    if done.returncode != code or not re.search(says, done.stdout):
        sys.exit(f"FAILED: exit code {done.returncode}, wanted {code} and a line like {says!r}")
    return done.stdout


def serve_and_generate(repository: Path, picture: Path, *options: str) -> float:
    """Serve the repository, make one picture; returns the seconds until the server was ready."""
    started = time.perf_counter()
    command = [*COMMAND, "serve", str(repository), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        address = re.search(r"at (\S+) \(gRPC\)", line)
        if address is None:
            sys.exit("FAILED: the server did not start")
        ready = time.perf_counter() - started
        print(f"--- ready after {ready:.1f} s", flush=True)
        run("generate", PROMPT, "--url", address[1], "--seed", "0", "--out", picture, *options, says="png")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    return ready


def main() -> None:
    """Run the check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    out = options.out
    try:
        target = find_target("local")
    except UserError as error:
        sys.exit(
            f"error: {error.problem}\nfix:   run this on a machine with an NVIDIA GPU, with nvidia-ml-py installed"
        )
    (compiler, _), (precision, reason) = choose(target), default_precision(target)
    print(f"{target.name}: {target}, {target.memory_gb} GiB; {compiler}, {precision}: {reason}\n", flush=True)

    run("export", options.checkpoint, "--out", out / "reference")
    activations = ("--activations", default_activations(target))
    run("export", options.checkpoint, "--out", out / "onnx", "--precision", precision, *activations)
    build = ("build", out / "onnx", "--gpu", "local", "--out")
    run(*build, out / "engines", *SIZES, says="built dit|nothing to build")
    run(*build, out / "engines", *SIZES, says="nothing to build")
    table = run("verify", out / "engines", "--against", out / "reference", says="velocity")
    velocity = next(line.split() for line in table.splitlines() if "velocity" in line)
    if not float(velocity[4]) < TOLERANCE:
        sys.exit(f"FAILED: the velocity's relative error is {velocity[4]}, wanted below {TOLERANCE}")
    run("repo", out / "engines", "--out", out / "repo")
    cold = serve_and_generate(out / "repo", out / "dynamic.png")
    warm = serve_and_generate(out / "repo", out / "dynamic-again.png")

    run(*build, out / "static-engines", "--static", "128x128", "--batch", "1", says="built dit|nothing to build")
    run("repo", out / "static-engines", "--out", out / "static-repo")
    serve_and_generate(out / "static-repo", out / "static.png")
    in_turn = ("--segments", "3", "--residency", "on-demand")
    run(*build, out / "segments", *SIZES, *in_turn, says="built dit|nothing to build")
    run("verify", out / "segments", "--against", out / "reference", says="velocity")
    run("repo", out / "segments", "--out", out / "segments-repo")
    serve_and_generate(out / "segments-repo", out / "segments.png")
    other = "sm_120" if "sm_120" not in target.capabilities else "sm_89"
    if compiler == "tensorrt-rtx":
        run("build", out / "onnx", "--gpu", other, "--out", out / "other", *SIZES, says="built dit|nothing to build")
        run("verify", out / "other", "--against", out / "reference", says=f"are for {other}", code=2)
    else:
        run(
            "build", out / "onnx", "--gpu", other, "--compiler", compiler, "--out", out / "other", says="itself", code=2
        )
    print(f"all passed; the server was ready after {cold:.1f} s, and {warm:.1f} s with its caches")
    pictures = ", ".join(str(out / f"{name}.png") for name in ("dynamic", "static", "segments"))
    print(f"look at {pictures}: {PROMPT}")


if __name__ == "__main__":
    main()
