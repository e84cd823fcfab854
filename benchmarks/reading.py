"""What it costs to read a checkpoint's weights from a file of full size, beside random weights, which are not read.

    python benchmarks/reading.py --folder out/reading --out docs/reading.md

The file is FLUX.1-dev's DiT in bf16 with its authors' names, whose fused weights are taken apart (24 GB, of random
values). From it, and from random weights, the DiT is exported in fp8-weights (12 GB), each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditforge.export.checkpoint.diffusers_folder import Checkpoint
from ditforge.export.checkpoint.random_weights import random_checkpoint
from ditforge.export.checkpoint.source import CheckpointSource, open_files
from ditforge.export.families import read_networks
from ditforge.export.graph.tracing import dry_run
from ditforge.export.onnx_export import export_network
from ditforge.export.quantisation.precision import parse_precision

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from single_files import flux_dit

MODEL, PRECISION = "flux.1-dev", "fp8-weights"
CHUNK = 1 << 24  # numbers, of which all weights are cut


def write_file(checkpoint: Checkpoint, path: Path) -> int:
    """Write the DiT as one safetensors file, a piece at a time. Returns its size in bytes."""
    _, _, networks = read_networks(checkpoint, parse_precision(PRECISION))
    dit = next(network for network in networks if network.name == "dit")
    state = {names[0]: torch.empty(shape, dtype=torch.bfloat16, device="meta") for names, shape in dry_run(dit)}
    shapes: Mapping[str, torch.Tensor] = flux_dit(state)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in shapes.items():
        begin, end = end, end + 2 * math.prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = torch.from_numpy(np.random.default_rng(0).standard_normal(CHUNK, np.float32) * 0.02).bfloat16()
    data = numbers.view(torch.uint8).numpy().data
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in header.values():
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                left -= file.write(data[: min(left, len(data))])
    return path.stat().st_size


def export_dit(checkpoint: Checkpoint, folder: Path) -> None:
    """Export the DiT, and print what this process took as JSON."""
    precision = parse_precision(PRECISION)
    _, _, networks = read_networks(checkpoint, precision)
    dit = next(network for network in networks if network.name == "dit")
    begun = time.perf_counter()
    export_network(dit, checkpoint, folder, precision.scheme)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = time.perf_counter() - begun
    told = {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "bytes": used.ru_maxrss * 1024}
    print(json.dumps(told))


def apart(*arguments: str) -> dict[str, float]:
    """Run this script in a process of its own, and return what it printed."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def report(found: Mapping[str, dict[str, float]], size: int) -> str:
    """The figures as Markdown."""
    rows = [
        f"| {name} | {each['seconds'] / 60:.1f} min | {each['cpu'] / 60:.1f} min | {each['bytes'] / 1e9:.2f} GB |"
        for name, each in found.items()
    ]
    lines = [
        "# Reading weights", "",
        f"Written by `benchmarks/reading.py`: the DiT of {MODEL} is exported in {PRECISION}, from random weights and "
        f"from a safetensors file of {size / 1e9:.1f} GB with its authors' names, whose fused weights are taken apart.",
        "",
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, safetensors {version('safetensors')}. Load of "
        f"the machine before: {os.getloadavg()[0]:.1f}.", "",
        "| weights | time | CPU | peak resident memory |", "| --- | --- | --- | --- |", *rows, "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Measure both, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="needs 40 GB")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", choices=["random", "file"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file, base = options.folder / f"{MODEL}.safetensors", options.folder / "base"
    if options.measure:
        onnx = options.folder / "onnx"
        onnx.mkdir()
        try:
            if options.measure == "file":
                export_dit(open_files(CheckpointSource(file, base)), onnx)
            else:
                with random_checkpoint(Path(MODEL)) as checkpoint:
                    export_dit(checkpoint, onnx)
        finally:
            shutil.rmtree(onnx)
        return
    with random_checkpoint(Path(MODEL)) as checkpoint:
        size = write_file(checkpoint, file)
        shutil.copytree(checkpoint.folder, base)
        (base / "vae").mkdir(exist_ok=True)
    found = {}
    for name, kind in (("random", "random"), (f"{file.name}", "file")):
        found[name] = apart("--folder", str(options.folder), "--measure", kind)
        print(name, found[name], flush=True)
    text = report(found, size)
    print(text)
    if options.out:
        options.out.write_text(text)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
