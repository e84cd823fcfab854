"""`ditforge bench`: how long the engines of a folder take on this machine, each network by itself, without a server."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ditforge import local_gpu, manifest
from ditforge.contract import DIT, PROMPT_EMBEDS, TOKENIZER, VAE_DECODER, VAE_ENCODER
from ditforge.engines import step_limit
from ditforge.engines.compilers import NUMPY_DTYPES, Arrays, LoadedEngine
from ditforge.engines.memory.fitting import least_batch
from ditforge.engines.runtime.loading import load_engine
from ditforge.engines.verify import example, varying_sizes
from ditforge.errors import UserError
from ditforge.manifest import Component, Manifest
from ditforge.model import MAX_BATCH, Model
from ditforge.option import command, option, setting
from ditforge.placement import CPU

WARM = 3  # calls that do not count: the first of a size may compile, allocate or record
DEFAULT_RUNS, MOST_RUNS = 10, 10_000

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Timing:
    """How long a network takes. Times are in milliseconds, of one call; `ms` is the median.

    load_s: the seconds until it was loaded and warm. gpu_memory: the bytes of the GPU's memory that it took; None on
    the CPU.
    """

    component: str
    precision: str
    compiler: str
    ms: float
    least_ms: float
    most_ms: float
    load_s: float
    gpu_memory: int | None


@dataclass(frozen=True)
class Step:
    """The time of a step of the DiT, beside what bounds it on this GPU.

    samples: how many it takes at a time. ms: the median of the calls. limit_ms: what its products and attention alone
    would take at the rates that this GPU reached by itself, and of_limit how many times that `ms` is; None where this
    is not known, and `unknown` says why. steps_a_second: how many steps of so many samples a second.
    """

    compiler: str
    precision: str
    samples: int
    ms: float
    limit_ms: float | None
    of_limit: float | None
    unknown: str
    steps_a_second: float
    gpu_memory: int | None


@dataclass(frozen=True)
class Bench:
    """What was measured: on which device, for pictures of which size, how many at a time, in how many calls.

    With classifier-free guidance, the DiT takes two samples for each picture. picture_s: the seconds that all calls for
    these pictures take, from text, with the model's own number of steps; None without a DiT or a decoder. step: the
    DiT's row; None without one.
    """

    device: str
    model: str
    width: int
    height: int
    batch: int
    runs: int
    timings: tuple[Timing, ...]
    steps: int
    picture_s: float | None
    step: Step | None


def bench(
    folder: Path, size: str | None = None, batch: int = 1, runs: int = DEFAULT_RUNS, progress: Progress | None = None
) -> Bench:
    """Time the engines in `folder`, one after the other, on random inputs.

    `size` is WIDTHxHEIGHT in pixels, by default the model's. Engines that are loaded on demand are loaded in each call,
    as when they serve. Raises UserError for a size or batch that the engines do not take, and for engines that this
    machine cannot execute.
    """
    found = manifest.read(folder, "engines")
    manifest.check_components(found, folder, [TOKENIZER])
    check_executable(folder, found)
    width, height = parse_size(size, found.model)
    check_numbers(found, batch, runs)
    report = progress or (lambda component, done, total: None)
    names, timings = [name for name in found.components if name != TOKENIZER], []
    for done, name in enumerate(names):
        report(name, done, len(names))
        component, made = found.components[name], found.engines[name]
        free = free_memory() if made.target != CPU else None
        began = time.perf_counter()
        engine = load_engine(folder, component.files, made)
        try:
            samples = batch * least_batch(found.model) if name == DIT else batch
            given = inputs_of(name, component, found.model, (height, width), samples)
            took = timed(engine, given, runs)
            loaded = time.perf_counter() - began - sum(took)
            taken = None if free is None else max(0, free - free_memory())
        finally:
            engine.close()
        ms = sorted(1e3 * seconds for seconds in took)
        timings.append(
            Timing(name, component.precision, made.compiler, statistics.median(ms), ms[0], ms[-1], loaded, taken)
        )
    dit = next((timing for timing in timings if timing.component == DIT), None)
    report("limit", len(names), len(names))
    step = step_of(dit, found, (width, height), batch * least_batch(found.model)) if dit else None
    report("done", len(names), len(names))
    here = any(engine.target != CPU for engine in found.engines.values())
    device = local_gpu.local_gpus()[0].product if here else CPU
    steps = found.model.default_steps
    picture_s = picture_time(timings, found.model)
    return Bench(device, found.model.name, width, height, batch, runs, tuple(timings), steps, picture_s, step)


def check_executable(folder: Path, found: Manifest) -> None:
    """Raise UserError, with what can be done instead, if engines in `folder` are for another machine's GPU."""
    targets = {engine.target for engine in found.engines.values()}
    if why := local_gpu.why_not_here(targets):
        wanted = " or ".join(sorted(targets - {CPU}))
        fix = f"{command('ditforge bench {}', folder)}   on a machine with {wanted}"
        rebuilt = "ditforge build ONNX_DIR --gpu cpu --out DIR   builds for this one"
        raise UserError(f"the engines in {folder} do not run here: {why}", f"{fix}; or {rebuilt}")


def step_of(timing: Timing, found: Manifest, size: tuple[int, int], samples: int) -> Step:
    """The DiT's row, for pictures of that (width, height), with the limit where it can be measured."""
    least, unknown = None, ""
    try:
        least = limit_of(timing, found, size, samples)
    except Exception as error:  # what was measured stays, whatever of the libraries for a GPU fails
        unknown = " ".join(str(error).split())[:300]
    of_limit = None if least is None else timing.ms / least
    return Step(
        timing.compiler, timing.precision, samples, timing.ms, least, of_limit, unknown, 1e3 / timing.ms,
        timing.gpu_memory,
    )  # fmt: skip


def limit_of(timing: Timing, found: Manifest, size: tuple[int, int], samples: int) -> float:
    """The least milliseconds of a step by the rates of this GPU. Raises UserError if that is not known."""
    component, side = found.components[DIT], math.prod(size) ** 0.5
    if found.engines[DIT].target == CPU:
        raise UserError("limits are measured of GPUs", "")
    text = component.inputs[PROMPT_EMBEDS].shape[1]
    footprint = component.footprint
    total = footprint.flops_at(side) if footprint else None
    of_attention = footprint.attention_at(side, int(text), found.model.size_multiple) if footprint else None
    if total is None or of_attention is None:
        raise UserError("the export did not count the operations of the DiT", "")
    rates = step_limit.measure_rates(timing.compiler)
    least = rates.least_ms(timing.precision, samples * (total - of_attention), samples * of_attention)
    if least is None:
        raise UserError(f"no rate of products in {timing.precision} can be measured here", "")
    return least


def parse_size(text: str | None, model: Model) -> tuple[int, int]:
    """Width and height in pixels. Raises UserError for a text that is no size, or one that the engines do not take."""
    if text is None:
        height, width = model.sizes[0] if model.sizes else (model.default_size, model.default_size)
        return width, height
    if not re.fullmatch(r"\d{1,6}x\d{1,6}", text):
        problem = f"{setting('size', text)} is not a size"
        raise UserError(problem, f"{setting('size', f'{model.default_size}x{model.default_size}')} (width x height)")
    width, height = map(int, text.split("x"))
    if model.sizes and (height, width) not in model.sizes:
        known = ", ".join(f"{w}x{h}" for h, w in model.sizes)
        raise UserError(f"the engines take {known}, not {text}", setting("size", known.split(", ")[0]))
    for side in (width, height):
        if side % model.size_multiple or not model.min_size <= side <= model.max_size:
            problem = (
                f"the engines take {model.min_size} to {model.max_size} pixels in steps of {model.size_multiple}, "
                f"not {side}"
            )
            raise UserError(problem, setting("size", f"{model.default_size}x{model.default_size}"))
    return width, height


def check_numbers(found: Manifest, batch: int, runs: int) -> None:
    """Raise UserError for a batch that the engines do not take, or a number of runs that makes no sense."""
    most = min((e.max_batch for e in found.engines.values() if e.max_batch), default=MAX_BATCH)
    most = max(most // least_batch(found.model), 1)
    if not 1 <= batch <= most:
        raise UserError(f"the engines take 1 to {most} pictures at a time, not {batch}", setting("batch", 1))
    if not 1 <= runs <= MOST_RUNS:
        raise UserError(f"{option('runs')} must be from 1 to {MOST_RUNS}, got {runs}", setting("runs", DEFAULT_RUNS))


def inputs_of(name: str, component: Component, model: Model, size: tuple[int, int], batch: int) -> Arrays:
    """Random inputs of a network for pictures of that (height, width)."""
    sizes = varying_sizes(model, name, size, batch)
    made: Arrays = {}
    for key, tensor in component.inputs.items():
        if tensor.dtype == "INT32":  # token ids, of which every vocabulary has the first
            made[key] = np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape], np.int32)
        else:
            made[key] = example(key, tensor, sizes, model).astype(NUMPY_DTYPES[tensor.dtype])
    return made


def timed(engine: LoadedEngine, given: Arrays, runs: int) -> list[float]:
    """The seconds of each of `runs` calls, until the outputs are in the CPU's memory, after some that do not count."""
    took = []
    for number in range(WARM + runs):
        began = time.perf_counter()
        engine.run(given)
        if number >= WARM:
            took.append(time.perf_counter() - began)
    return took


def free_memory() -> int:
    """The bytes of the first GPU's memory that nobody has taken."""
    return local_gpu.local_gpus()[0].memory_free


def picture_time(timings: list[Timing], model: Model) -> float | None:
    """The seconds of all calls of a picture from text; None without a DiT or a decoder."""
    ms = {timing.component: timing.ms for timing in timings}
    if DIT not in ms or VAE_DECODER not in ms:
        return None
    calls = {DIT: model.default_steps, VAE_ENCODER: 0}
    return sum(calls.get(name, 1) * time for name, time in ms.items()) / 1e3
