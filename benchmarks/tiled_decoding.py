"""What tiles save when pictures are decoded, and what they cost: memory, time, and likeness to the whole picture.

    python benchmarks/tiled_decoding.py models/flux-tiny --out benchmarks/tiled_decoding.md

The latents are those of a drawn scene, as often as it takes side by side. They are decoded as the CPU server and its
client do, whole and in tiles, each in a process of its own, whose peak resident memory is reported: engine, blending
and picture together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TILE = 512  # pixels, as is DRAWN: the size of the scene
DRAWN = 512
SIZES = (1024, 1536, 2048, 4096, 6144)
LIMIT = 10e9  # bytes of memory for a process
SCENE = "a large red circle above a small blue square on a white background"


def save_latents(checkpoint: Path, out: Path) -> None:
    """The scene's latents [1, C, h, w], scaled as the decoder's graph takes them."""
    import torch
    from diffusers import AutoencoderKL

    sys.path.append(str(Path(__file__).parent.parent / "models"))
    import scenes

    vae = AutoencoderKL.from_pretrained(checkpoint / "vae").eval()
    picture = scenes.draw([scenes.parse_caption(SCENE)], DRAWN, DRAWN, seed=0)
    with torch.no_grad():
        latents = vae.encode(picture * 2 - 1).latent_dist.mode()
    np.save(out, ((latents - vae.config.shift_factor) * vae.config.scaling_factor).numpy())


def decode_once(folder: Path, size: int, tile: int | None) -> None:
    """Decode, save the picture, and print what it took as JSON. Runs in a process of its own."""
    from ditforge import manifest
    from ditforge.client.decoding import decode
    from ditforge.engines.runtime.loading import load_engine

    resource.setrlimit(resource.RLIMIT_AS, (int(LIMIT), int(LIMIT)))
    built = manifest.read(folder / "engines", "engines")
    engine = built.engines["vae_decoder"]
    files = built.components["vae_decoder"].files
    loaded = load_engine(folder / "engines", files, engine)
    latents = np.tile(np.load(folder / "latents.npy"), (1, 1, size // DRAWN, size // DRAWN))
    started = time.perf_counter()
    picture = decode(lambda z: loaded.run({"latents": z})["image"], latents, built.model.vae_factor, tile)
    seconds = time.perf_counter() - started
    np.save(picture_file(folder, tile), picture)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # which Linux gives in KiB
    print(json.dumps({"seconds": seconds, "bytes": peak}))


def picture_file(folder: Path, tile: int | None) -> Path:
    """Where a picture is put."""
    return folder / ("tiled.npy" if tile else "whole.npy")


def measure(folder: Path, size: int, tile: int | None) -> dict[str, float] | None:
    """`decode_once` in a process of its own; None where it does not fit into LIMIT."""
    command = [sys.executable, __file__, "--folder", folder, "--size", size, "--tile", tile or 0]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode and "llocat" not in done.stderr + done.stdout:  # bad_alloc, Failed to allocate, …
        raise RuntimeError(done.stderr)
    measured: dict[str, float] | None = None if done.returncode else json.loads(done.stdout)
    return measured


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """In dB, of 8-bit pictures."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(np.float32) - b) ** 2)))


def report(folder: Path) -> str:
    """The figures as Markdown, whole and tiled beside each other."""
    lines = [
        f"{date.today()}, {os.cpu_count()} cores, {processor()}, Python {platform.python_version()}",
        "",
        f"| pixels | whole: peak memory | time | tiles of {TILE}²: peak memory | time | PSNR |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size in SIZES:
        cells = [f"{size}²"]
        whole, tiled = measure(folder, size, None), measure(folder, size, TILE)
        for took in (whole, tiled):
            cells += [f"{took['bytes'] / 1e9:.2f} GB", f"{took['seconds']:.1f} s"] if took else ["does not fit", ""]
        both = [np.load(picture_file(folder, tile)) for tile in (TILE, None)] if whole and tiled else []
        lines.append(f"| {' | '.join([*cells, f'{psnr(*both):.1f} dB' if both else ''])} |")
        print(lines[-1], flush=True)
    return "\n".join([*lines, "", f"A process had {LIMIT / 1e9:.0f} GB of address space.", ""])


def processor() -> str:
    """The processor's name."""
    names = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def main() -> None:
    """Export and build in a temporary folder, measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    for name, kind in (("--folder", Path), ("--size", int), ("--tile", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)  # of the processes that this one starts
    options = parser.parse_args()
    if options.folder:
        decode_once(options.folder, options.size, options.tile or None)
        return
    if not options.checkpoint or not options.out:
        parser.error("CHECKPOINT and --out are needed")
    with tempfile.TemporaryDirectory() as temporary:
        from ditforge.engines.build import build
        from ditforge.export.checkpoint.source import CheckpointSource
        from ditforge.export.onnx_export import export_checkpoint

        folder = Path(temporary)
        export_checkpoint(CheckpointSource(options.checkpoint), folder / "onnx")
        build(folder / "onnx", folder / "engines")
        save_latents(options.checkpoint, folder / "latents.npy")
        text = report(folder)
    print(text)
    head = f"# {options.checkpoint.name}: tiled decoding\n\nWritten by `benchmarks/{Path(__file__).name}`.\n\n"
    options.out.write_text(head + text)


if __name__ == "__main__":
    main()
