"""How fast a picture is, beside diffusers on the same cores, and what serving adds to each step: `make bench`.

    python benchmarks/first_picture.py models/flux-tiny models/sd35-tiny --out benchmarks/first_picture.md

Both sides of each comparison are measured in one run, in turn, so that a drift of the machine meets both.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from tritonclient.grpc import InferenceServerClient, InferInput

from ditforge import manifest
from ditforge.client import Client
from ditforge.client.connection import Connection
from ditforge.client.settings import make_settings
from ditforge.engines.build import build
from ditforge.engines.compilers import Arrays
from ditforge.engines.runtime.loading import load_engine
from ditforge.engines.verify import example
from ditforge.export.checkpoint.source import CheckpointSource
from ditforge.export.onnx_export import export_checkpoint
from ditforge.triton_repo.repository import write_repository
from ditforge.triton_repo.server import Server, start

PROMPT = "a large red circle above a small blue square on a white background"
STEPS = 20
PICTURES = 15
CALLS = 300
TARGET_SPEEDUP = 1.5
TARGET_OVERHEAD_MS = 2.0


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, made one after the other, `rounds` times after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 3):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if turn >= 3:
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def pictures(client: Client, pipeline: DiffusionPipeline) -> dict[str, list[float]]:
    """Whole pictures of the same prompt, seed and steps, at the model's own size."""
    size, tokens = client.model.default_size, client.model.max_tokens["t5"]

    def with_diffusers() -> None:
        pipeline(
            PROMPT,
            height=size,
            width=size,
            num_inference_steps=STEPS,
            guidance_scale=client.model.default_guidance,
            max_sequence_length=tokens,
            generator=torch.Generator("cpu").manual_seed(0),
        )

    return in_turn(
        {"diffusers": with_diffusers, "ditforge": lambda: client.generate(PROMPT, seed=0, steps=STEPS)}, PICTURES
    )


def through_tritonclient(url: str, inputs: Arrays) -> Callable[[], object]:
    """A call of the DiT by Triton's own client, of a request that is made beforehand."""
    client, tensors = InferenceServerClient(url), []
    for name, array in inputs.items():
        column = array[:, None] if array.ndim == 1 else array  # a number a sample travels as [B, 1]
        tensors.append(InferInput(name, column.shape, "FP32").set_data_from_numpy(column))
    return lambda: client.infer("dit", tensors)


def steps(server: Server, engines: Path) -> dict[str, list[float]]:
    """The same step as a call of the engine in this process, and over gRPC: to Triton, to the front, by the client."""
    built = manifest.read(engines, "engines")
    component, engine = built.components["dit"], built.engines["dit"]
    size = built.model.default_size // built.model.vae_factor
    sizes = {"batch": 1, "latent_height": size, "latent_width": size}
    inputs = {name: example(name, tensor, sizes, built.model) for name, tensor in component.inputs.items()}
    if "skip_layers" in inputs:  # from 0 to 1, which a server checks; a client sends 0 unless it is asked for
        inputs["skip_layers"][:] = 0
    loaded = load_engine(engines, component.files, engine)
    connection = Connection(make_settings(server.url))
    (triton,) = Path("/dev/shm").glob(f"*-{server.pid}-*/grpc:1")  # which only this user can reach
    served = connection.infer("dit", inputs)["velocity"]
    assert np.allclose(served, loaded.run(inputs)["velocity"], atol=1e-4), "the two sides compute different things"
    ways = {
        "in process": lambda: loaded.run(inputs),
        "Triton alone": through_tritonclient(f"unix:{triton}", inputs),
        "through the front": through_tritonclient(server.url, inputs),
        "served": lambda: connection.infer("dit", inputs),
    }
    return in_turn(ways, CALLS)


def report(picture: dict[str, list[float]], step: dict[str, list[float]]) -> str:
    """The figures as Markdown, each target beside its measurement."""
    median = {name: statistics.median(times) for name, times in (picture | step).items()}
    speedup = median["diffusers"] / median["ditforge"]
    overhead = median["served"] - median["in process"]

    def row(name: str, times: list[float]) -> str:
        return f"| {name} | {statistics.median(times):.1f} | {min(times):.1f} | {max(times):.1f} |"

    def verdict(met: bool) -> str:
        return "met" if met else "MISSED"

    return "\n".join(
        [
            f"{date.today()}, {os.cpu_count()} cores, {platform.processor() or platform.machine()}, "
            f"Python {platform.python_version()}, torch {torch.__version__} with {torch.get_num_threads()} threads",
            "",
            f"| a picture, {STEPS} steps, fp32 | median ms | min | max |",
            "| --- | --- | --- | --- |",
            *(row(name, times) for name, times in picture.items()),
            "",
            f"{speedup:.2f} times as fast as diffusers; target {TARGET_SPEEDUP}: {verdict(speedup >= TARGET_SPEEDUP)}",
            "",
            "| a step, batch 1 | median ms | min | max |",
            "| --- | --- | --- | --- |",
            *(row(name, times) for name, times in step.items()),
            "",
            f"Triton adds {median['Triton alone'] - median['in process']:.2f} ms to a step, the front "
            f"{median['through the front'] - median['Triton alone']:.2f} ms, the client "
            f"{median['served'] - median['through the front']:.2f} ms; together {overhead:.2f} ms, target at most "
            f"{TARGET_OVERHEAD_MS}: {verdict(overhead <= TARGET_OVERHEAD_MS)}",
            "",
        ]
    )


def measure(checkpoint: Path) -> str:
    """The report of one checkpoint, which goes through all stages in a temporary folder."""
    pipeline = DiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        onnx, engines, repository = (Path(folder) / name for name in ("onnx", "engines", "repo"))
        export_checkpoint(CheckpointSource(checkpoint), onnx)
        build(onnx, engines)
        write_repository(engines, repository)
        with start(repository, port=0) as server, Client(server.url) as client:
            return report(pictures(client, pipeline), steps(server, engines))


def main() -> None:
    """Measure each checkpoint; print and write the reports."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    text = "# Speed\n\nWritten by `make bench`, with each model's own guidance.\n"
    for checkpoint in options.checkpoints:
        text += f"\n## {checkpoint.resolve().name}\n\n{measure(checkpoint)}"
    print(text)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
