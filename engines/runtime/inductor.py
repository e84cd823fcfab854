"""Executes engines of Inductor: packages of regions one after the other, with weights that are resident or streamed.

A package is loaded once, however many blocks it serves, and is given the weights of the block in each call. All engines
of a process compute in one CUDA stream, one after the other. PyTorch's allocator gives memory only to the stream that
had it before, so that is how they share what they need for activations.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any
from weakref import WeakSet
from zipfile import ZipFile

import numpy as np
import torch
from torch import Tensor

from ditforge import temporary_folder
from ditforge.engines.compilers import NUMPY_DTYPES, Arrays, Shape
from ditforge.engines.compilers.inductor_engine import SUFFIX, WEIGHTS, Description, Variant, read
from ditforge.engines.runtime.ranges import find_range
from ditforge.engines.runtime.staging import Staging, pin, unpin
from ditforge.engines.runtime.weights_reader import WeightsReader
from ditforge.errors import DitforgeError, UserError
from ditforge.local_gpu import why_not_here
from ditforge.manifest import NEXT_COMMAND
from ditforge.option import command

ALIGNMENT = 256  # bytes; matrix products read weights in vectors, and TMA wants at least 16
GRAPHS = 4  # of how many shapes an engine keeps the CUDA graphs
LAUNCHING = 0.5  # of a run's time: if starting its kernels takes a larger part, a CUDA graph makes it faster
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # in which users set up PyTorch's allocator

_lock = threading.Lock()
log = logging.getLogger(__name__)


def load_engine(
    files: list[Path],
    target: str,
    built_with: str,
    version: str,
    budget: int | None = None,
    graphs: bool = True,
) -> Execution:
    """Load an engine from its files. `budget` is how many bytes of weights stay in the GPU's memory; None is all.

    `graphs` says whether it may record CUDA graphs, which hold memory for activations of their own. Raises UserError if
    it is for another GPU, or if another version of PyTorch compiled it.
    """
    by_suffix = {file.suffix: file for file in files}
    if SUFFIX not in by_suffix or WEIGHTS not in by_suffix:
        there = ", ".join(file.name for file in files)
        raise UserError(
            f"an engine of inductor has files {SUFFIX} and {WEIGHTS}, and not only {there}",
            f"{NEXT_COMMAND['engines']}   again",
        )
    path = by_suffix[SUFFIX]
    rebuild = command("ditforge build ONNX_DIR --gpu {} --compiler inductor --out DIR   and then ditforge repo", target)
    if built_with != version:
        raise UserError(f"{path} was compiled by PyTorch {built_with}, and {version} is installed", rebuild)
    if why := why_not_here([target]):
        raise UserError(f"engines like {path} do not run here: {why}", f"a machine with {target}; or {rebuild}")
    device = torch.device("cpu" if target == "cpu" else "cuda")
    return Execution(read(path), path.parent, by_suffix[WEIGHTS], device, budget, graphs)


def load_package(path: Path, device: torch.device) -> Any:
    """Load a package. PyTorch's own function would compile a C++ program the first time in a process, for 40 s.

    Raises DitforgeError, or BadZipFile, if the package is damaged: loading its code would end the process. Raises
    UserError if there is no room for temporary files, among which PyTorch unpacks it.
    """
    with ZipFile(path) as archive:
        temporary_folder.check(sum(file.file_size for file in archive.infolist()))
        if damaged := archive.testzip():
            raise DitforgeError(f"{path} is damaged: {damaged} in it has changed", f"{NEXT_COMMAND['engines']}   again")
    number = torch.cuda.current_device() if device.type == "cuda" else -1
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, number)


@dataclass
class Shared:
    """What all engines of the process use on the GPU.

    computing, copying: CUDA streams. staging: through which weights come. graphs: all CUDA graphs that there are.
    pool: the memory of their activations.
    """

    computing: Any
    copying: Any
    staging: Staging
    graphs: WeakSet[Any] = field(default_factory=WeakSet)
    pool: Any = None

    def record(self, calls: Callable[[], dict[str, Tensor]]) -> tuple[Any, dict[str, Tensor]]:
        """Record what `calls` starts on the GPU, and return the graph, with what `calls` returns.

        Raises RuntimeError if something in it cannot be recorded, or memory runs out.
        """
        torch.cuda.empty_cache()  # of what the runs before took, which the graph takes from other memory
        if not self.graphs:  # PyTorch takes no pool again that has lost all its graphs, where memory is in pieces
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.computing, capture_error_mode="relaxed"):
            outputs = calls()
        self.graphs.add(graph)
        return graph, outputs


@cache
def shared() -> Shared:
    """What all engines of this process share on the GPU.

    Memory that the allocator has in pieces can be put together, unless the user has set up the allocator otherwise, or
    the driver does not map memory in pieces, as in some virtual machines.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        set_up_allocator("expandable_segments:True")
        try:
            torch.empty(1, device="cuda")
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            log.info("memory in pieces is not put together: %s", error)
            set_up_allocator("expandable_segments:False")
    computing, copying = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    return Shared(computing, copying, Staging(copying))


def set_up_allocator(settings: str) -> None:
    """Set up PyTorch's allocator, as its environment variable would have before it was used."""
    torch._C._accelerator_setAllocatorSettings(settings)


def out_of_memory(device: torch.device) -> int:
    """How often PyTorch's allocator has not found memory on the device, in this process.

    torch.cuda.memory_stats() sorts all that it knows, for a millisecond.
    """
    if device.type == "cpu":
        return 0
    return int(torch._C._cuda_memoryStats(torch.cuda.current_device())["num_ooms"])


@dataclass
class Block:
    """The weights of one call: where each lies in the call's memory, and the tensors, if they are resident."""

    places: list[tuple[int, torch.dtype, Shape]]
    size: int
    host: Tensor | None = None
    tensors: list[Tensor] = field(default_factory=list)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Where the bytes of each weight begin and end."""
        counts = [int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for _, dtype, shape in self.places]
        return [(start, start + count) for (start, _, _), count in zip(self.places, counts, strict=True)]

    def views(self, memory: Tensor) -> list[Tensor]:
        """Return the weights in `memory` [size], which has a copy of them."""
        pairs = zip(self.places, self.spans, strict=True)
        return [memory[start:end].view(dtype).view(shape) for (_, dtype, shape), (start, end) in pairs]

    def read(self, file: WeightsReader, names: Sequence[str], memory: Tensor, staging: Staging | None = None) -> None:
        """Read the weights, which are called so in the file, into `memory` [size] of the machine, or by `staging`."""
        places = [memory[start:end] for start, end in self.spans]
        if staging is not None:
            staging.fill(file, names, places)
        else:
            file.read(names, [place.numpy() for place in places])


@dataclass
class Replay:
    """A CUDA graph of all calls for one shape, with the tensors that it reads and writes."""

    graph: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Execution:
    """An engine of Inductor on a device."""

    def __init__(
        self,
        description: Description,
        folder: Path,
        weights: Path,
        device: torch.device,
        budget: int | None,
        graphs: bool,
    ) -> None:
        self.description, self.folder, self.device = description, folder, device
        self.inputs, self.outputs = list(description.inputs), list(description.outputs)
        self.shared = shared() if device.type == "cuda" else None
        self.loaded: dict[str, Any] = {}
        self.replays: OrderedDict[tuple[Shape, ...], Replay] = OrderedDict()
        self.runs: Counter[tuple[Shape, ...]] = Counter()
        self.launching: dict[tuple[Shape, ...], float] = {}
        self.blocks: list[Block] = []
        try:
            with self.stream():
                self.read_weights(weights, budget)
        except BaseException:
            self.close()
            raise
        self.streamed = [number for number, block in enumerate(self.blocks) if block.host is not None]
        self.graphs = graphs and not self.streamed

    def stream(self) -> AbstractContextManager[Any]:
        """Work in the stream in which all engines compute, for the duration of the block."""
        return torch.cuda.stream(self.shared.computing) if self.shared else nullcontext()

    def read_weights(self, path: Path, budget: int | None) -> None:
        """Read the weights of all calls: as many as the budget allows to the device, and others to pinned memory."""
        with WeightsReader(path) as file:
            for call in self.description.calls:
                places, size = [], 0
                for name in call.weights:
                    dtype, shape = file.dtypes[name], file.shapes[name]
                    places.append((size, dtype, shape))
                    size += -(-int(np.prod(shape, dtype=np.int64)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
                self.blocks.append(Block(places, size))
            if self.shared:
                self.shared.copying.wait_stream(self.shared.computing)  # memory may have been another engine's
            sizes = [block.size for block in self.blocks]
            stays = [True] * len(sizes) if budget is None else spread(sizes, budget)
            for block, call, stay in zip(self.blocks, self.description.calls, stays, strict=True):
                if stay:
                    memory = torch.empty(block.size, dtype=torch.uint8, device=self.device)
                    block.read(file, call.weights, memory, self.shared.staging if self.shared else None)
                    block.tensors = block.views(memory)
                else:
                    memory = torch.empty(block.size, dtype=torch.uint8)
                    block.read(file, call.weights, memory)
                    if self.shared:
                        pin(memory.data_ptr(), memory.numel())
                    block.host = memory
            if self.shared:
                self.shared.computing.wait_stream(self.shared.copying)

    def variant(self, shapes: dict[str, Shape]) -> Variant:
        """Return the first variant that takes the shapes. Raises UserError if none does."""
        variants = self.description.variants
        ranges = [{name: (v.smallest[name], v.largest[name]) for name in self.inputs} for v in variants]
        return variants[find_range(ranges, shapes)]

    def package(self, file: str) -> Any:
        """Return a package, loaded when it is first needed."""
        if file not in self.loaded:
            self.loaded[file] = load_package(self.folder / file, self.device)
        return self.loaded[file]

    def run(self, inputs: Arrays) -> Arrays:
        """Compute the outputs, by name, for inputs by name."""
        return self.run_batch([inputs])

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """The outputs of several requests as one batch, in the memory of the CPU."""
        with _lock, torch.no_grad(), self.stream():
            given = {name: self.upload(name, [part[name] for part in parts]) for name in self.inputs}
            shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
            variant = self.variant(shapes)
            if self.shared:
                outputs = self.replayed(self.shared, variant, given, tuple(shapes.values()))
            else:
                outputs = self.run_calls(variant, given)
            return {name: outputs[name].cpu().numpy() for name in self.outputs}

    def upload(self, name: str, parts: Sequence[Any]) -> Tensor:
        """Put the parts of an input together as one batch on the device."""
        tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(self.device)

    def replayed(
        self, shared: Shared, variant: Variant, given: dict[str, Tensor], key: tuple[Shape, ...]
    ) -> dict[str, Tensor]:
        """Run all calls: as a CUDA graph from the third time of a shape on, if that is faster.

        In the first run, libraries load their kernels. The second one shows how much of its time goes into starting
        kernels; a GPU that has enough to do meanwhile gains nothing from a graph.
        """
        if not self.graphs:
            return self.run_calls(variant, given)
        if self.runs[key] == 1:
            outputs = self.run_timed(shared, variant, given, key)
        elif self.runs[key] < 1 or self.launching[key] < LAUNCHING:
            outputs = self.run_calls(variant, given)
        elif replay := self.find_replay(shared, variant, given, key):
            for name, tensor in given.items():
                replay.inputs[name].copy_(tensor)
            replay.graph.replay()
            outputs = replay.outputs
        else:
            torch.cuda.empty_cache()  # of what could not be recorded
            outputs = self.run_calls(variant, given)
        self.runs[key] += 1  # a run that failed says nothing of the time
        return outputs

    def find_replay(
        self, shared: Shared, variant: Variant, given: dict[str, Tensor], key: tuple[Shape, ...]
    ) -> Replay | None:
        """Find the CUDA graph of a shape, or record it. None if it cannot be recorded, and then never again."""
        if key not in self.replays:
            if len(self.replays) == GRAPHS:
                self.replays.popitem(last=False)
            fixed = {name: tensor.clone() for name, tensor in given.items()}
            try:
                graph, outputs = shared.record(partial(self.run_calls, variant, fixed))
            except RuntimeError as error:
                log.warning("no CUDA graph for %s: %s", " ".join(map(str, key)), error)
                self.launching[key] = 0.0
                return None
            self.replays[key] = Replay(graph, fixed, {name: outputs[name] for name in self.outputs})
        self.replays.move_to_end(key)
        return self.replays[key]

    def forget_graphs(self) -> None:
        """Free all recorded graphs. They are recorded anew."""
        self.replays.clear()
        self.runs.clear()
        self.launching.clear()

    def run_timed(
        self, shared: Shared, variant: Variant, given: dict[str, Tensor], key: tuple[Shape, ...]
    ) -> dict[str, Tensor]:
        """Run all calls, and note which part of the time it took to start their kernels."""
        shared.computing.synchronize()
        began = time.perf_counter()
        outputs = self.run_calls(variant, given)
        started = time.perf_counter()
        shared.computing.synchronize()
        self.launching[key] = (started - began) / (time.perf_counter() - began)
        return outputs

    def run_calls(self, variant: Variant, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the calls one after the other. A tensor is freed after the last call that takes it.

        Raises torch.OutOfMemoryError if the GPU's memory does not suffice.
        """
        calls, known = self.description.calls, dict(given)
        last = {name: number for number, call in enumerate(calls) for name in call.inputs}
        slots = Slots(self) if self.streamed else None
        failures = out_of_memory(self.device)
        for number, call in enumerate(calls):
            weights = slots.weights(number) if slots else self.blocks[number].tensors
            try:
                package = self.package(variant.packages[call.kind])
                results: list[Tensor] = package.boxed_run([*(known[name] for name in call.inputs), *weights])
            except RuntimeError as error:  # packages do not tell apart why they fail
                if out_of_memory(self.device) == failures:
                    raise
                raise torch.OutOfMemoryError(f"CUDA out of memory in {call.kind}") from error
            if slots:
                slots.done(number)
            known |= dict(zip(call.outputs, results, strict=True))
            for name in call.inputs:
                if last[name] == number and name not in self.outputs:
                    known.pop(name, None)
        return known

    def warm_up(self) -> None:
        """Run the best shape of each variant on zeros, which loads its packages and may record a CUDA graph."""
        for variant in self.description.variants:
            zeros = {
                name: np.zeros(shape, NUMPY_DTYPES[self.description.inputs[name].dtype])
                for name, shape in variant.smallest.items()
            }
            for _ in range(3 if self.graphs and self.shared else 1):
                self.run_batch([zeros])

    def close(self) -> None:
        """Free the weights, the packages and the recorded graphs."""
        with _lock:
            self.forget_graphs()
            if self.shared:
                self.shared.copying.synchronize()  # memory that is still copied must not be freed
            for block in self.blocks:
                if self.shared and block.host is not None:
                    unpin(block.host.data_ptr())
            self.blocks.clear()
            self.loaded.clear()
            if self.shared:
                torch.cuda.empty_cache()


def spread(sizes: Sequence[int], budget: int) -> list[bool]:
    """Which blocks of these sizes stay on the GPU, with at most `budget` bytes in all. They are spread over the calls.

    So blocks are copied all the time while others compute. Were those that stay together, none would be copied for as
    long as these compute.
    """
    stays, kept, passed, total = list[bool](), 0, 0, max(sum(sizes), 1)
    for size in sizes:
        passed += size
        stays.append((kept + size / 2) * total <= passed * budget and kept + size <= budget)
        kept += size if stays[-1] else 0
    for number, size in enumerate(sizes):  # what the rounding has left
        if not stays[number] and kept + size <= budget:
            stays[number] = True
            kept += size
    return stays


class Slots:
    """Streams the weights of a run through two slots: the next block is copied while this one computes.

    The slots are freed with it, so that other engines have the memory between the runs.
    """

    def __init__(self, execution: Execution) -> None:
        self.execution, self.shared = execution, execution.shared
        self.order = execution.streamed
        largest = max(execution.blocks[number].size for number in self.order)
        self.memory = [torch.empty(largest, dtype=torch.uint8, device=execution.device) for _ in range(2)]
        self.ready: dict[int, Any] = {}
        self.free: list[Any] = [None, None]
        for number in self.order[:2]:
            self.copy(number)

    def slot(self, number: int) -> int:
        """Which of the two slots a block goes through."""
        return self.order.index(number) % 2

    def copy(self, number: int) -> None:
        """Begin to copy a block into its slot, as soon as what used the memory before has been computed."""
        block, slot = self.execution.blocks[number], self.slot(number)
        assert block.host is not None
        if self.shared is None:
            self.memory[slot][: block.size].copy_(block.host)
            return
        computing, copying = self.shared.computing, self.shared.copying
        with torch.cuda.stream(copying):
            if self.free[slot] is not None:
                copying.wait_event(self.free[slot])
            else:
                copying.wait_stream(computing)
            self.memory[slot][: block.size].copy_(block.host, non_blocking=True)
            self.ready[number] = copying.record_event()

    def weights(self, number: int) -> list[Tensor]:
        """Return the weights of a call, for which its computation will wait."""
        block = self.execution.blocks[number]
        if block.host is None:
            return block.tensors
        if self.shared is not None:
            self.shared.computing.wait_event(self.ready.pop(number))
        return block.views(self.memory[self.slot(number)][: block.size])

    def done(self, number: int) -> None:
        """Note that a call has been started, and begin to copy the block that comes into its slot next."""
        if self.execution.blocks[number].host is None:
            return
        place = self.order.index(number)
        if self.shared is not None:
            self.free[place % 2] = self.shared.computing.record_event()
        if place + 2 < len(self.order):
            self.copy(self.order[place + 2])
