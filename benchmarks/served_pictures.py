"""Pictures of one server beside those of another: what engines of a GPU make, and the same prompts and seeds on a CPU.

    python benchmarks/served_pictures.py make localhost:8001 --out out/pictures-cpu
    python benchmarks/served_pictures.py compare out/pictures-gpu out/pictures-cpu --out docs/served-pictures.md

`make` asks the server at that address for pictures of each size, one at a time, as a batch, and from several threads at
once; it writes them as PNG files, with the times in times.json. It needs what the client needs. `compare` writes how
far apart the pictures in two such folders are. It exits with 1 if a picture is missing, or further than LARGEST apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from ditforge.client import Client

PROMPTS = (
    "a large red circle above a small blue square on a white background",
    "a small green triangle to the left of a large yellow circle on a black background",
    "a large blue square",
    "a small purple circle below a large orange triangle on a gray background",
)
SIZES = ("128x128", "192x96", "64x256")
STEPS, SEED = 20, 7
# Of 255 levels. An engine that multiplies fp32 as TF32, of 10 bits, rounds otherwise than a CPU does.
LARGEST = 4


def make(url: str, gpu: str, out: Path) -> None:
    """Write the pictures of the server at `url`, and how long they took."""
    out.mkdir(parents=True, exist_ok=True)
    times: dict[str, list[float]] = {"one at a time": [], "as a batch of 4": [], "from 4 threads at once": []}
    with Client(url) as client:
        client.generate(PROMPTS[0], seed=SEED, size=SIZES[0])  # loads what is loaded at first use

        def one(index: int, size: str) -> Image.Image:
            return client.generate(PROMPTS[index], seed=SEED + index, size=size, steps=STEPS)

        for size in SIZES:
            for index in range(len(PROMPTS)):
                begun = time.perf_counter()
                one(index, size).save(out / f"one-{size}-{index}.png")
                times["one at a time"].append(time.perf_counter() - begun)
            begun = time.perf_counter()
            batch = client.generate(list(PROMPTS), seed=SEED, size=size, steps=STEPS)
            times["as a batch of 4"].append((time.perf_counter() - begun) / len(PROMPTS))
            with ThreadPoolExecutor(len(PROMPTS)) as pool:
                begun = time.perf_counter()
                threads = list(pool.map(one, range(len(PROMPTS)), [size] * len(PROMPTS)))
                times["from 4 threads at once"].append((time.perf_counter() - begun) / len(PROMPTS))
            for kind, images in (("batch", batch), ("threads", threads)):
                for index, image in enumerate(images):
                    image.save(out / f"{kind}-{size}-{index}.png")
        told = {
            "model": client.model.name,
            "machine": f"{gpu or platform.processor() or platform.machine()}, {date.today().isoformat()}",
            "milliseconds": {kind: round(1000 * median(found), 1) for kind, found in times.items()},
        }
    (out / "times.json").write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told))


def compare(folder: Path, reference: Path, out: Path) -> bool:
    """Write how far apart the pictures are; returns whether all are near enough."""
    made, expected = (json.loads((each / "times.json").read_text()) for each in (folder, reference))
    rows, good = [], True
    for kind in ("one", "batch", "threads"):
        for size in SIZES:
            worst, differing = 0, 0.0
            for index in range(len(PROMPTS)):
                theirs = np.asarray(Image.open(reference / f"{kind}-{size}-{index}.png"), np.int16)
                ours = np.asarray(Image.open(folder / f"{kind}-{size}-{index}.png"), np.int16)
                worst = max(worst, int(np.abs(ours - theirs).max()))
                differing += float((ours != theirs).mean()) / len(PROMPTS)
            good &= worst <= LARGEST
            rows.append((kind, size, f"{worst} of 255", f"{differing:.3%}"))
    lines = [
        "# Pictures of engines on a GPU", "",
        f"Written by `benchmarks/served_pictures.py`: {len(PROMPTS)} prompts a row, {STEPS} steps, through the front, "
        "Triton and the", "client, beside the same prompts and seeds on a CPU.", "",
        f"{made['model']}. Engines: {made['machine']}. Reference: {expected['machine']}.", "",
        "| asked for | size | largest difference | numbers that differ |", "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows), "",
        f"Milliseconds a picture, median: {'; '.join(f'{how}, {ms}' for how, ms in made['milliseconds'].items())}.",
    ]  # fmt: skip
    out.write_text("\n".join(lines) + "\n")
    print(out.read_text())
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("url")
    making.add_argument("--machine", default="", help="What the engines run on; by default this machine's processor.")
    comparing = commands.add_parser("compare")
    comparing.add_argument("folder", type=Path)
    comparing.add_argument("reference", type=Path)
    for command in (making, comparing):
        command.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "make":
        make(given.url, given.machine, given.out)
    else:
        sys.exit(0 if compare(given.folder, given.reference, given.out) else 1)


if __name__ == "__main__":
    main()
