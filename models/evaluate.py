"""Measures how many captions a checkpoint gets right: the stock pipeline's pictures, judged.

    python models/evaluate.py models/flux-tiny --count 400

Captions hold a combination that was kept out of training. Writes evaluation.json into the folder.
"""

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from judge import Verdict, judge
from PIL import Image
from scenes import held_out_captions

ATTRIBUTES = ("correct", "count", "background", "colour", "shape", "size", "relation")
GUIDANCE, STEPS = 3.5, 20


def load_pipeline(folder: Path, device: str) -> DiffusionPipeline:
    """The folder's own pipeline class in float32, without a progress bar."""
    pipeline = DiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(
    pipeline: DiffusionPipeline,
    captions: list[str],
    *,
    seed: int,
    guidance: float = GUIDANCE,
    height: int = 128,
    width: int = 128,
    text_length: int = 64,
    batch: int = 64,
) -> list[Image.Image]:
    """One picture for each caption by 20 Euler steps; caption i starts from the noise of seed + i on the CPU."""
    pictures: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        prompts = captions[start : start + batch]
        pictures += pipeline(
            prompts,
            height=height,
            width=width,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            max_sequence_length=text_length,
            generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(prompts))],
        ).images
    return pictures


def shares(verdicts: list[Verdict]) -> dict[str, float]:
    """Share of the verdicts that are right, entirely ("correct") and in each attribute."""
    return {name: round(sum(getattr(v, name) for v in verdicts) / len(verdicts), 4) for name in ATTRIBUTES}


def contact_sheet(pictures: list[Image.Image], columns: int) -> Image.Image:
    """Equally large pictures in rows."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def evaluate(folder: Path, count: int, seed: int, device: str) -> dict[str, object]:
    """The report that evaluation.json holds; failures and a sheet of the first 64 pictures go to build/."""
    pipeline = load_pipeline(folder, device)
    captions = held_out_captions(count, seed)
    fewer = captions[: max(1, count // 2)]
    cases: dict[str, tuple[list[str], dict[str, float]]] = {
        "128x128, guidance 3.5": (captions, {}),
        "128x128, guidance 1.0": (fewer, {"guidance": 1.0}),
        "128x128, guidance 5.0": (fewer, {"guidance": 5.0}),
        "128x128, text padded to 512": (fewer, {"text_length": 512, "batch": 32}),
        "96x160": (fewer, {"height": 96, "width": 160}),
        "160x96": (fewer, {"height": 160, "width": 96}),
        "160x160": (fewer, {"height": 160, "width": 160}),
        "256x256": (fewer, {"height": 256, "width": 256, "batch": 32}),
    }
    results: dict[str, dict[str, float]] = {}
    out = Path("build/evaluate")
    out.mkdir(parents=True, exist_ok=True)
    if "text_encoder_3" in pipeline.components:
        cases["128x128, without T5"] = (captions, {})  # the last case: T5 is gone for good
    for name, (prompts, options) in cases.items():
        start = time.perf_counter()
        if name.endswith("without T5"):
            pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
        pictures = paint(pipeline, prompts, seed=seed, **options)  # type: ignore[arg-type]
        verdicts = [judge(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        results[name] = {"pictures": len(prompts), **shares(verdicts)}
        print(f"{name}: {results[name]}  {time.perf_counter() - start:.1f} s", flush=True)
        stem = name.replace(", ", "_").replace(" ", "_")
        contact_sheet(pictures[:64], 8).save(out / f"{stem}.png")
        failed = [i for i, verdict in enumerate(verdicts) if not verdict.correct][:64]
        if failed:
            contact_sheet([pictures[i] for i in failed], 8).save(out / f"{stem}_failed.png")
            lines = [f"{prompts[i]}\n    {verdicts[i].seen}" for i in failed]
            (out / f"{stem}_failed.txt").write_text("\n".join(lines) + "\n")
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "CPU"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "seed": seed,
        "captions": "held-out combinations, two objects",
        "sampler": f"{type(pipeline).__name__}, {STEPS} Euler steps, float32",
        "results": results,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a diffusers folder")
    parser.add_argument("--count", type=int, default=400, help="captions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=2026, help="of captions and noise (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args()
    report = evaluate(args.folder, args.count, args.seed, args.device)
    (args.folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
