"""Pictures of diffusers' own pipeline with random weights in bf16: on the GPU, compiled, and with its ways to offload.

Each way runs in a process of its own, which makes the pipeline once and then measures it under one card after the
other. A picture of few steps is timed: before the first step, each step, and after the last one. The seconds of a
picture with all steps are extrapolated from these. A way that fails on a card is not tried on smaller ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_memory import Gpu, Neighbour, neighbour, usable, watching
from gpu_run import GIB, Failed, Results, Row, end, line_of, started, why

PROMPT = "a large red circle above a small blue square on a white background"
UNCAPPED = ("eager", "compiled")
OFFLOADING = ("model", "sequential", "group")
NAMES = {
    "eager": "all on the GPU, eager",
    "compiled": "compile_repeated_blocks, cuDNN attention",
    "model": "enable_model_cpu_offload",
    "sequential": "enable_sequential_cpu_offload",
    "group": "enable_group_offload, leaf_level, use_stream",
}
MAKING = 300.0  # seconds that the making of a pipeline may take, all its weights pinned
WARMING, MEASURING = 300.0, 240.0  # seconds of a first call, which may compile, and of a measurement


def make_pipeline(model: str) -> tuple[Any, Row]:
    """A published model's pipeline, or that of a folder, with random bf16 weights; and the options of a call."""
    import torch
    from diffusers import DiffusionPipeline

    from ditforge.export.checkpoint.random_weights import random_checkpoint, random_tensor
    from ditforge.export.families import read_networks
    from ditforge.export.quantisation.precision import FP32
    from ditforge.export.quantisation.reference_pipeline import unfilled

    with random_checkpoint(Path(model)) as checkpoint:
        known, _, networks = read_networks(checkpoint, FP32)
        made = {}
        for component in dict.fromkeys(network.weights for network in networks):
            module = unfilled(checkpoint, component)
            same: dict[int, torch.Tensor] = {}  # weights that have two names
            state = {}
            for name, parameter in module.state_dict(keep_vars=True).items():
                if parameter.is_meta:
                    if id(parameter) not in same:
                        same[id(parameter)] = random_tensor(f"{component}.{name}", tuple(parameter.shape))
                    state[name] = same[id(parameter)]
            module.load_state_dict(state, strict=False, assign=True)
            made[component] = module.eval().requires_grad_(False).to(torch.bfloat16)
        pipeline = DiffusionPipeline.from_pretrained(checkpoint.folder, dtype=torch.bfloat16, **made)
    pipeline.set_progress_bar_config(disable=True)
    options: Row = {"guidance_scale": known.default_guidance, "output_type": "pil"}
    if "t5" in known.max_tokens:
        options["max_sequence_length"] = known.max_tokens["t5"]
    return pipeline, options


def place(pipeline: Any, way: str, device: str) -> None:
    """Put the pipeline where the way has it."""
    import torch

    if way == "model":
        pipeline.enable_model_cpu_offload()
    elif way == "sequential":
        pipeline.enable_sequential_cpu_offload()
    elif way == "group":
        pipeline.enable_group_offload(
            onload_device=torch.device(device),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device != "cpu",
        )
    else:
        pipeline.to(device)
    if way == "compiled":
        compile_blocks(pipeline.transformer)


def compile_blocks(transformer: Any, dynamic: bool | None = None) -> None:
    """Compile each kind of block once, as diffusers does it. If it does not say what blocks are: all in lists."""
    import torch

    if not transformer._repeated_blocks:
        lists = [child for child in transformer.children() if isinstance(child, torch.nn.ModuleList)]
        transformer._repeated_blocks = sorted({type(block).__name__ for blocks in lists for block in blocks})
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=dynamic)


def timed(pipeline: Any, options: Row, side: int, steps: int) -> Row:
    """A picture of so many steps: the seconds before the first, of the first, of another one, and after the last."""
    import numpy as np
    import torch

    times: list[float] = []

    def note() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    def begins(module: Any, given: Any) -> None:
        if not times:
            note()

    def ends(pipeline: Any, index: int, timestep: Any, given: Row) -> Row:
        note()
        return {}

    hook = pipeline.transformer.register_forward_pre_hook(begins)
    try:
        began = time.perf_counter()
        made = pipeline(
            PROMPT, height=side, width=side, num_inference_steps=steps, callback_on_step_end=ends,
            generator=torch.Generator("cpu").manual_seed(0), **options,
        )  # fmt: skip
        ended = time.perf_counter()
    finally:
        hook.remove()
    first, *others = [later - before for before, later in pairwise(times)]
    levels = len(np.unique(np.asarray(made.images[0])))
    return {
        "text_s": times[0] - began,
        "first_step_s": first,
        "step_s": statistics.median(others) if others else first,
        "vae_s": ended - times[-1],
        "valid": levels > 1,
    }


def work(model: str, way: str, side: int, steps: int) -> None:
    """Make a pipeline, and measure it for each line of standard input. Answers are lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is not an answer

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    pipeline, options = make_pipeline(model)
    placed = warm = False
    answer(made=True)
    for _ in sys.stdin:
        try:
            with sdpa_kernel(order, set_priority=True) if way == "compiled" else contextlib.nullcontext():
                if not placed:
                    place(pipeline, way, device)
                    placed = True
                if not warm:
                    timed(pipeline, options, side, 1)
                    warm = True
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                found = timed(pipeline, options, side, steps)
            if device == "cuda":
                found["allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
            answer(**found)
        except Exception as error:
            answer(failed=" ".join(f"{type(error).__name__}: {error}".split())[:300])
            return  # hooks may have left weights anywhere
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


class Worker:
    """The process of one way."""

    def __init__(self, model: str, way: str, side: int, steps: int, log: Path) -> None:
        self.log, self.way = log, way
        command = [sys.executable, __file__, model, way, str(side), str(steps)]
        self.process = started(command, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answer(self, seconds: float) -> Row:
        """What the process says next. Raises Failed if it says nothing in time, or has ended, or failed."""
        line = line_of(self.process, seconds)
        if not line:
            raise Failed(f"the process ended with {self.process.wait(10)}: {why(self.log)}")
        found: Row = json.loads(line)
        if "failed" in found:
            raise Failed(found["failed"])
        return found

    def measure(self, seconds: float) -> Row:
        """Have the pipeline measured once."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"measure\n")
        self.process.stdin.flush()
        return self.answer(seconds)


def name_of(way: str, card: float | None) -> str:
    """The name of a row."""
    return f"diffusers {way}" + (f" {card:g} GiB" if card else "")


def measure_way(
    results: Results, gpu: Gpu | None, beside: Neighbour | None, way: str, cards: list[float | None], given: list[Any]
) -> None:
    """Measure one way under one card after the other, the largest first. After a failure the smaller ones are left."""
    model, side, steps, whole, log = given
    worker = Worker(model, way, side, steps, log)
    first = True
    try:
        began = time.perf_counter()
        worker.answer(min(MAKING, max(results.left, 1)))
        making = time.perf_counter() - began
        for card in cards:
            name = name_of(way, card)

            def measure(name: str = name, card: float | None = card, first: bool = first) -> bool:
                limit = MEASURING + (WARMING if first else 0)
                if beside and card:
                    beside.leave(usable(card))
                before = beside.taken if beside else 0
                with watching(gpu, before) as watch:
                    found = worker.measure(min(limit, max(results.left, 1)))
                if watch:
                    found["peak_gib"] = watch.peak / GIB
                once = found["text_s"] + found["first_step_s"] + found["vae_s"]
                found["picture_s"] = once + (whole - 1) * found["step_s"]
                results.note(name, way=NAMES[way], card=card, steps=steps, of=whole, making_s=making, **found)
                return True

            if results.attempted(name, measure) is None:
                for other in cards[cards.index(card) + 1 :]:
                    if results.left > 0:
                        results.rows.pop(name_of(way, other), None)
                        results.note(name_of(way, other), way=NAMES[way], card=other, skipped=f"{name} failed")
                results.note(name, way=NAMES[way], card=card)
                return
            first = False
    finally:
        end(worker.process, grace=2)


def measure_diffusers(
    results: Results, gpu: Gpu | None, model: str, side: int, steps: int, whole: int, cards: list[float],
    ways: list[str], logs: Path,
) -> None:  # fmt: skip
    """All ways of `ways`, each under the cards or, for those without offloading, with the whole GPU."""
    if gpu is None:
        skipped = "it needs a GPU"
        for way in [way for way in ways if way != "eager"]:
            results.note(name_of(way, None), way=NAMES[way], skipped=skipped)
        ways = [way for way in ways if way == "eager"]
    with neighbour(gpu, logs / "neighbour.log") as beside:
        for way in ways:
            largest_first: list[float | None] = [*sorted(cards, reverse=True)] if way in OFFLOADING else [None]
            given = [model, side, steps, whole, logs / f"diffusers-{way}.log"]
            if beside and way in UNCAPPED:
                beside.leave(beside.gpu.total - beside.context)  # hold nothing

            def measure(way: str = way, cards: list[float | None] = largest_first, given: list[Any] = given) -> bool:
                measure_way(results, gpu, beside, way, cards, given)
                return True

            results.attempted(f"diffusers {way} pipeline", measure)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
