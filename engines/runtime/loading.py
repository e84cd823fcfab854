"""Loads and runs engines, whichever compiler made them: whole or in segments, for good, for one call, or streamed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ditforge import manifest
from ditforge.engines.compilers import Arrays, Compiler, LoadedEngine, find_compiler, streamed_segments
from ditforge.engines.memory.memory_plan import gibibytes
from ditforge.engines.runtime.one_at_a_time import gpu_lock
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.machine_memory import read_memory
from ditforge.manifest import Engine, File

AGAIN = "ditforge build ONNX_DIR --gpu GPU --out DIR   again, and then ditforge repo"


def load_engine(folder: Path, files: dict[str, File], made: Engine) -> LoadedEngine:
    """Load an engine from its `files` in `folder`. `made` says how it was made and where it is placed.

    An engine that is loaded on demand is loaded once now, so that errors show at once. Raises UserError if a file is
    missing or not what the manifest says, or if the engine cannot be run here, and DitforgeError if the GPU's memory
    does not hold it.
    """
    manifest.check_files(folder, files, fix=AGAIN)
    compiler = maker(folder, made.compiler)
    frugally, budget = compiler.load_frugally, made.placement.weight_budget
    if budget is not None and frugally is None:
        problem = f"the engine in {folder} is to stream its weights, which engines of {made.compiler} cannot"
        raise UserError(problem, AGAIN)
    segments = made.segment_files or [list(files)]
    resident = len(segments) - made.placement.on_demand

    def load(number: int, budget: int | None = budget) -> LoadedEngine:
        paths = [folder / name for name in segments[number]]
        if frugally is not None and (budget is not None or number >= resident):
            return frugally(paths, made.target, made.compiler_version, budget)
        return compiler.load(paths, made.target, made.compiler_version)

    try:
        loaders = [partial(load, number) for number in range(len(segments))]
        parts = [one() for one in loaders[:resident]]
        streamed = []
        if streamed_segments(compiler, made.placement):
            size = sum(files[name].size for names in segments[resident:] for name in names)
            streamed = stream([partial(one, budget=0) for one in loaders[resident:]], size, folder)
        parts += streamed or [OnDemand(one) for one in loaders[resident:]]
        for part in parts:
            part.warm_up()
        return parts[0] if len(parts) == 1 else Chain(parts, 1 if streamed else made.placement.slots)
    except UserError:
        raise
    except Exception as error:  # TensorRT's, CuPy's, ONNX Runtime's and the driver's have no common class
        said = " ".join(str(error).split())[:300]
        if not re.search(r"out ?of ?memory", said, re.IGNORECASE):
            if isinstance(error, DitforgeError | ModuleNotFoundError):
                raise
            raise DitforgeError(f"{made.compiler} cannot load the engine in {folder}: {said}", AGAIN) from error
        raise DitforgeError(
            f"the GPU's memory does not hold the engine in {folder}: {said}",
            "ditforge build ONNX_DIR --gpu GPU --gpu-memory GIB --out DIR   with fewer GiB than it has; ditforge repo",
        ) from error


def stream(loaders: Sequence[Callable[[], LoadedEngine]], size: int, folder: Path) -> list[LoadedEngine]:
    """Load segments whose weights, of `size` bytes in all, stay in the machine's memory and are streamed in each call.

    Returns none of them, and says why, if the machine has too little memory or a segment cannot stream.
    """
    memory, streamed = read_memory(), list[LoadedEngine]()
    try:
        if memory is not None and size > memory.available:
            had = f"{gibibytes(memory.available)} of this machine's memory are free"
            raise UserError(f"streaming the weights takes {gibibytes(size)}, and {had}", "free some memory")
        for load in loaders:
            streamed.append(load())
    except UserError as error:
        for engine in streamed:
            engine.close()
        why = f"the engine in {folder} does not stream, and is loaded from its files in each step: {error.problem}"
        warnings.warn(why, DitforgeWarning, stacklevel=2)
        return []
    return streamed


def maker(folder: Path, name: str) -> Compiler:
    """The compiler that made an engine. Raises UserError if it is not installed."""
    try:
        return find_compiler(name)
    except UserError as error:
        raise UserError(f"the engine in {folder} cannot be loaded: {error.problem}", AGAIN) from error


class OnDemand:
    """An engine that waits for the GPU's lock, is loaded for each call, and is freed after the call."""

    def __init__(self, load: Callable[[], LoadedEngine]) -> None:
        self.load = load
        self.inputs: list[str] = []
        self.outputs: list[str] = []

    @contextmanager
    def loaded(self) -> Iterator[LoadedEngine]:
        """Load the engine for the duration of the block."""
        with gpu_lock():
            engine = self.load()
            try:
                yield engine
            finally:
                engine.close()

    def warm_up(self) -> None:
        """Load the engine once, so that errors show and the kernels that were compiled for the GPU are kept on disk."""
        with self.loaded() as engine:
            self.inputs, self.outputs = engine.inputs, engine.outputs
            engine.warm_up()

    def run(self, inputs: Arrays) -> Arrays:
        """Compute the outputs, by name, for inputs by name."""
        with self.loaded() as engine:
            return engine.run(inputs)

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """The outputs of several requests as one batch."""
        with self.loaded() as engine:
            return engine.run_batch(parts)

    def close(self) -> None:
        """Do nothing, because nothing is loaded between calls."""


class Chain:
    """Segments that run one after the other. Values stay on their device, and are kept only as long as needed.

    `slots` is how many of those that are loaded on demand may be loaded at a time. Raises UserError if a segment comes
    before one whose outputs it takes.
    """

    def __init__(self, segments: list[LoadedEngine], slots: int = 1) -> None:
        self.segments, self.slots = segments, slots
        for number, segment in enumerate(segments, 1):
            if early := {name for later in segments[number:] for name in later.outputs} & {*segment.inputs}:
                problem = f"segment {number} of {len(segments)} takes {min(early)}, which a later one gives"
                raise UserError(f"the segments of the engine are not in their order: {problem}", AGAIN)
        made = {name for segment in segments for name in segment.outputs}
        taken = list(dict.fromkeys(name for segment in segments for name in segment.inputs))
        self.inputs = [name for name in taken if name not in made]
        self.outputs = [name for segment in segments for name in segment.outputs if name not in taken]

    def warm_up(self) -> None:
        """Warm all segments up."""
        for segment in self.segments:
            segment.warm_up()

    def run(self, inputs: Arrays) -> Arrays:
        """Compute the outputs, by name and in the memory of the CPU, for inputs by name."""
        outputs = self.run_batch([inputs])
        return {name: array if isinstance(array, np.ndarray) else array.get() for name, array in outputs.items()}

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """The outputs of several requests as one batch, which is put together once."""
        values = {name: concatenated([part[name] for part in parts]) for name in self.inputs}
        with closing(self.in_turn() if self.slots == 1 else self.ahead()) as segments:
            for done, segment in enumerate(segments, 1):
                values |= segment.run_batch([{name: values[name] for name in segment.inputs}])
                needed = {*self.outputs, *(name for later in self.segments[done:] for name in later.inputs)}
                values = {name: value for name, value in values.items() if name in needed}
        return values

    def in_turn(self) -> Generator[LoadedEngine, None, None]:
        """The segments in their order; one that is loaded on demand is loaded when it runs."""
        yield from self.segments

    def ahead(self) -> Generator[LoadedEngine, None, None]:
        """The segments in their order; of those that are loaded on demand, the next one is loaded while one runs."""
        waiting = [segment for segment in self.segments if isinstance(segment, OnDemand)]
        resident = self.segments[: len(self.segments) - len(waiting)]  # on demand are the last ones
        engine: LoadedEngine | None = None
        with gpu_lock(), ThreadPoolExecutor(1) as thread:
            coming = [thread.submit(segment.load) for segment in waiting[:1]]
            try:
                yield from resident
                for number in range(1, len(waiting) + 1):
                    engine = coming.pop().result()  # raises what went wrong in the thread
                    coming = [thread.submit(segment.load) for segment in waiting[number : number + 1]]
                    yield engine
                    engine.close()
                    engine = None
            finally:
                if engine is not None:
                    engine.close()
                for one in coming:
                    with suppress(Exception):  # of a segment that is not needed any more
                        one.result().close()

    def close(self) -> None:
        """Close all segments."""
        for segment in self.segments:
            segment.close()


def concatenated(arrays: list[Any]) -> Any:
    """Arrays of NumPy or CuPy as one batch, which is on the GPU if one of the arrays is."""
    if len(arrays) == 1:
        return arrays[0]
    if all(isinstance(array, np.ndarray) for array in arrays):
        return np.concatenate(arrays)
    import cupy

    batch = cupy.concatenate([cupy.asarray(array) for array in arrays])
    cupy.cuda.get_current_stream().synchronize()  # engines run on streams of their own
    return batch
