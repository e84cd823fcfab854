"""What 8 bits cost: pictures of each 8-bit precision beside the fp32 ones, by numbers and by the judge.

    python benchmarks/accuracy.py models/flux-tiny models/sd35-tiny --out docs/accuracy.md

The same held-out captions and seeds go through every stage and a server in each precision, with fp32 around the 8-bit
linears, so that the differences are quantisation's alone. All sides are measured in one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ditforge.client import Client
from ditforge.engines.build import build
from ditforge.engines.verify import Difference, compare
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.onnx_export import ExportOptions, export_checkpoint
from ditforge.export.quantisation.calibration import calibrate
from ditforge.export.quantisation.precision import EIGHT_BIT
from ditforge.triton_repo.repository import write_repository
from ditforge.triton_repo.server import start

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from judge import judge
from scenes import caption, held_out_captions, training_scenes

PRECISIONS = ("fp32", "fp8", "fp8-weights", "int8-weights")
STEPS = 20
SEED = 2026
CALIBRATION_PROMPTS = 64
LARGEST_LOSS = 1.0  # points of the judge's score that fp8 may lose


def pictures(onnx: Path, folder: Path, captions: list[str]) -> list[Image.Image]:
    """The export in `onnx`, built and served: a picture for each caption, seeds counting up from SEED."""
    build(onnx, folder / "engines")
    write_repository(folder / "engines", folder / "repo")
    with start(folder / "repo", port=0) as server, Client(server.url) as client:
        return client.generate(captions, seed=SEED, steps=STEPS)


def row(name: str, images: list[Image.Image], reference: list[Image.Image], captions: list[str]) -> list[str]:
    """Precision, captions right in percent, PSNR and SSIM against the reference, each as mean and worst."""
    right = 100 * sum(judge(i, c).correct for i, c in zip(images, captions, strict=True)) / len(captions)
    if name == "fp32":
        return [name, f"{right:.1f}", "", "", "", ""]
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(reference, images, strict=True)]
    psnr = [60.0 if np.array_equal(a, b) else min(60.0, peak_signal_noise_ratio(a, b)) for a, b in pairs]
    ssim = [structural_similarity(a, b, channel_axis=2) for a, b in pairs]
    figures = (np.mean(psnr), np.min(psnr), np.mean(ssim), np.min(ssim))
    return [name, f"{right:.1f}", *(f"{f:.1f}" for f in figures[:2]), *(f"{f:.3f}" for f in figures[2:])]


def markdown(headings: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """A table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def report(name: str, count: int, rows: list[list[str]], differences: list[Difference]) -> str:
    """The figures, and how the judge's score of fp8 stands to its target."""
    score = {row[0]: float(row[1]) for row in rows}
    loss = score["fp32"] - score["fp8"]
    verdict = "met" if loss <= LARGEST_LOSS else "MISSED"
    return "\n".join(
        [
            f"## {name}",
            "",
            f"{date.today()}, {platform.machine()}, on the CPU: {count} held-out captions.",
            "",
            *markdown(("precision", "captions right, %", "PSNR", "worst", "SSIM", "worst"), rows),
            "",
            f"fp8 {change(loss)} of the judge's score; a loss of at most {LARGEST_LOSS} is the target: {verdict}",
            "",
            "One call of the DiT, against fp32:",
            "",
            *markdown(
                ("precision", "relative error", "cosine", "PSNR"),
                [[d.precision, f"{d.relative:.4f}", f"{d.cosine:.6f}", f"{d.psnr:.1f}"] for d in differences],
            ),
            "",
        ]
    )


def change(loss: float) -> str:
    """What becomes of the judge's score, in points."""
    if round(loss, 1) == 0:
        return "changes nothing"
    return f"{'loses' if loss > 0 else 'gains'} {abs(loss):.1f} points"


def measure(checkpoint: Path, captions: list[str]) -> str:
    """The report of one checkpoint, which is exported, built and served in every precision."""
    images, rows, differences = {}, [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wording = random.Random(SEED)
        prompts = [caption(scene, wording) for scene in training_scenes(CALIBRATION_PROMPTS, SEED)]
        calibrate(CheckpointSource(checkpoint), folder / "ranges.json", prompts, STEPS)
        for name in PRECISIONS:
            onnx = folder / name / "onnx"
            ranges = folder / "ranges.json" if name == "fp8" else None
            around = "fp32" if name in EIGHT_BIT else None
            export_checkpoint(CheckpointSource(checkpoint), onnx, ExportOptions(name, around, ranges))
            images[name] = pictures(onnx, folder / name, captions)
            rows.append(row(name, images[name], images["fp32"], captions))
            print(json.dumps(rows[-1]), flush=True)
            if name != "fp32":
                differences += [d for d in compare(onnx, folder / "fp32" / "onnx") if d.component == "dit"]
    return report(checkpoint.resolve().name, len(captions), rows, differences)


def main() -> None:
    """Measure each checkpoint; print and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=200)
    options = parser.parse_args()
    captions = held_out_captions(options.captions, SEED)
    text = (
        f"# What 8 bits cost\n\nWritten by `make accuracy`: {STEPS} Euler steps at each model's own guidance, "
        f"seeds from {SEED}; PSNR (dB, at most 60) and SSIM against fp32.\n"
    )
    for checkpoint in options.checkpoints:
        text += f"\n{measure(checkpoint, captions)}"
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
