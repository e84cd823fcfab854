"""From a checkpoint to a picture through every stage, with the time that each takes: `make demo`.

    python examples/first_picture.py models/flux-tiny --out out/demo

Each stage is the command that a user would type; the server is stopped at the end.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "a large red circle above a small blue square on a white background"


def stage(name: str, *arguments: str) -> None:
    """Run one command of ditforge to its end, and print how long it took."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ditforge", name, *arguments], check=True)
    print(f"--- {name}: {time.perf_counter() - started:.1f} s\n", flush=True)


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", default=PROMPT)
    options = parser.parse_args()
    onnx, engines, repository, picture = (options.out / name for name in ("onnx", "engines", "repo", "picture.png"))

    stage("export", str(options.checkpoint), "--out", str(onnx))
    stage("build", str(onnx), "--gpu", "cpu", "--out", str(engines))
    stage("repo", str(engines), "--out", str(repository))

    started = time.perf_counter()
    command = [sys.executable, "-m", "ditforge", "serve", str(repository), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        address = re.search(r"at (\S+) \(gRPC\)", line)
        if address is None:
            sys.exit(server.wait() or 1)
        print(f"{line.strip()}\n--- serve: ready after {time.perf_counter() - started:.1f} s\n", flush=True)
        stage("generate", options.prompt, "--url", address[1], "--seed", "0", "--out", str(picture))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    print(f"the picture: {picture.resolve()}")


if __name__ == "__main__":
    main()
