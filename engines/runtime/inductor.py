"""Executes engines of Inductor: packages of regions one after the other, with weights that are resident or streamed.

A package is loaded once, however many blocks it serves, and is given the weights of the block in each call.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditforge.engines.compilers import NUMPY_DTYPES, Arrays, Shape
from ditforge.engines.compilers.inductor_engine import SUFFIX, WEIGHTS, Description, Variant, read
from ditforge.engines.runtime.ranges import find_range
from ditforge.engines.runtime.weights_reader import WeightsReader
from ditforge.errors import DitforgeError, UserError
from ditforge.local_gpu import why_not_here
from ditforge.manifest import NEXT_COMMAND
from ditforge.option import command
from ditforge.regions import Call

ALIGNMENT = 256  # bytes; matrix products read weights in vectors, and TMA wants at least 16
GRAPHS = 4  # of how many shapes the CUDA graphs are kept

_lock = threading.Lock()


def load_engine(files: list[Path], target: str, built_with: str, version: str, budget: int | None = None) -> Execution:
    """Load an engine from its files. `budget` is how many bytes of weights stay in the GPU's memory; None is all.

    Raises UserError if it is for another GPU, or if another version of PyTorch compiled it.
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
    return Execution(read(path), path.parent, by_suffix[WEIGHTS], device, budget)


def load_package(path: Path, device: torch.device) -> Any:
    """Load a package. PyTorch's own function would compile a C++ program the first time in a process, for 40 s."""
    number = torch.cuda.current_device() if device.type == "cuda" else -1
    return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, number)


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

    def read(self, file: WeightsReader, names: Sequence[str], memory: Tensor) -> None:
        """Read the weights, which are called so in the file, into `memory` [size] of the machine."""
        array = memory.numpy()
        file.read(names, [array[start:end] for start, end in self.spans])


@dataclass
class Replay:
    """A CUDA graph of all calls for one shape, with the tensors that it reads and writes."""

    graph: Any
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


class Execution:
    """An engine of Inductor on a device."""

    def __init__(
        self, description: Description, folder: Path, weights: Path, device: torch.device, budget: int | None
    ) -> None:
        self.description, self.folder, self.device = description, folder, device
        self.inputs, self.outputs = list(description.inputs), list(description.outputs)
        self.cuda = device.type == "cuda"
        self.blocks = self.read_weights(weights, budget)
        self.loaded: dict[str, Any] = {}
        self.replays: OrderedDict[tuple[Shape, ...], Replay] = OrderedDict()
        self.seen: set[tuple[Shape, ...]] = set()
        self.streamed = [number for number, block in enumerate(self.blocks) if block.host is not None]
        if self.cuda:
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self.copying = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self.pool = torch.cuda.graph_pool_handle()
        self.slots: list[Tensor] = []
        if self.streamed:
            largest = max(self.blocks[number].size for number in self.streamed)
            self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]

    def read_weights(self, path: Path, budget: int | None) -> list[Block]:
        """Read the weights of all calls: as many as the budget allows to the device, and others to pinned memory."""
        blocks, resident = [], 0
        with WeightsReader(path) as file:
            for call in self.description.calls:
                places, size = [], 0
                for name in call.weights:
                    dtype, shape = file.dtypes[name], file.shapes[name]
                    places.append((size, dtype, shape))
                    size += -(-int(np.prod(shape, dtype=np.int64)) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
                blocks.append(Block(places, size))
            staged = Staging(self.device, max((block.size for block in blocks), default=0))
            for block, call in zip(blocks, self.description.calls, strict=True):
                if budget is None or resident + block.size <= budget:
                    resident += block.size
                    block.tensors = block.views(staged.read(block, file, call.weights))
                else:
                    block.host = torch.empty(block.size, dtype=torch.uint8)
                    block.read(file, call.weights, block.host)
                    if self.cuda:
                        pin(block.host)
            staged.finish()
        return blocks

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
        with _lock, torch.no_grad():
            given = {name: self.upload(name, [part[name] for part in parts]) for name in self.inputs}
            shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
            variant = self.variant(shapes)
            if not self.cuda:
                outputs = self.run_calls(variant, given)
                return {name: outputs[name].numpy() for name in self.outputs}
            with torch.cuda.stream(self.stream):
                self.stream.wait_stream(torch.cuda.default_stream())
                outputs = self.replayed(variant, given, tuple(shapes.values()))
                arrays = {name: outputs[name].to("cpu") for name in self.outputs}
            return {name: tensor.numpy() for name, tensor in arrays.items()}

    def upload(self, name: str, parts: Sequence[Any]) -> Tensor:
        """Put the parts of an input together as one batch on the device."""
        tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
        return (tensors[0] if len(tensors) == 1 else torch.cat(tensors)).to(self.device)

    def replayed(self, variant: Variant, given: dict[str, Tensor], key: tuple[Shape, ...]) -> dict[str, Tensor]:
        """Run all calls: as a CUDA graph from the second time of a shape on, unless weights are streamed."""
        if self.streamed or key not in self.seen:
            self.seen.add(key)
            return self.run_calls(variant, given)
        if key not in self.replays:
            if len(self.replays) == GRAPHS:
                self.replays.popitem(last=False)
            fixed = {name: tensor.clone() for name, tensor in given.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="relaxed"):
                outputs = self.run_calls(variant, fixed)
            self.replays[key] = Replay(graph, fixed, {name: outputs[name] for name in self.outputs})
        self.replays.move_to_end(key)
        replay = self.replays[key]
        for name, tensor in given.items():
            replay.inputs[name].copy_(tensor)
        replay.graph.replay()
        return replay.outputs

    def run_calls(self, variant: Variant, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run the calls one after the other. A tensor is freed after the last call that takes it."""
        calls, known = self.description.calls, dict(given)
        last = {name: number for number, call in enumerate(calls) for name in call.inputs}
        slots = Slots(self) if self.streamed else None
        for number, call in enumerate(calls):
            weights = slots.weights(number) if slots else self.blocks[number].tensors
            results = self.call(variant, call, [known[name] for name in call.inputs], weights)
            if slots:
                slots.done(number)
            known |= dict(zip(call.outputs, results, strict=True))
            for name in call.inputs:
                if last[name] == number and name not in self.outputs:
                    known.pop(name, None)
        return known

    def call(self, variant: Variant, call: Call, inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """Run the package of one call."""
        results: list[Tensor] = self.package(variant.packages[call.kind]).boxed_run([*inputs, *weights])
        return results

    def warm_up(self) -> None:
        """Run the best shape of each variant on zeros, which loads its packages and records the CUDA graphs."""
        for variant in self.description.variants:
            zeros = {
                name: np.zeros(shape, NUMPY_DTYPES[self.description.inputs[name].dtype])
                for name, shape in variant.smallest.items()
            }
            for _ in range(2 if self.cuda else 1):
                self.run_batch([zeros])

    def close(self) -> None:
        """Free the weights, the packages and the recorded graphs."""
        with _lock:
            self.replays.clear()
            for block in self.blocks:
                if self.cuda and block.host is not None:
                    unpin(block.host)
            self.blocks.clear()
            self.loaded.clear()
            self.slots.clear()
            if self.cuda:
                torch.cuda.empty_cache()


def pin(memory: Tensor) -> None:
    """Have CUDA copy from memory directly. PyTorch's own pinned memory would be rounded up to a power of two.

    Raises DitforgeError if the system does not allow so much.
    """
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)  # type: ignore[no-untyped-call]
    if int(status):
        problem = f"{memory.numel() / 2**20:.0f} MiB of weights cannot be kept in memory for the GPU: {status}"
        raise DitforgeError(problem, "ulimit -l unlimited   and more free memory")


def unpin(memory: Tensor) -> None:
    """Undo pin(), before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]


class Staging:
    """Brings weights to a device: while one block is copied from one of two buffers, the next is read into the other.

    `size` is the bytes of the largest block. Without a GPU, blocks are read to where they stay.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)] if self.cuda else []
        for buffer in self.buffers:
            pin(buffer)
        self.copied: list[Any] = [None, None]
        self.turn = 0

    def read(self, block: Block, file: WeightsReader, names: Sequence[str]) -> Tensor:
        """Return the memory [size] of a block on the device. After finish(), its weights are there."""
        memory = torch.empty(block.size, dtype=torch.uint8, device=self.device)
        if not self.cuda:
            block.read(file, names, memory)
            return memory
        buffer, before = self.buffers[self.turn][: block.size], self.copied[self.turn]
        if before is not None:
            before.synchronize()
        block.read(file, names, buffer)
        memory.copy_(buffer, non_blocking=True)
        self.copied[self.turn] = torch.cuda.current_stream().record_event()
        self.turn = 1 - self.turn
        return memory

    def finish(self) -> None:
        """Wait until everything has been copied, and give the buffers back."""
        for copied in self.copied:
            if copied is not None:
                copied.synchronize()
        for buffer in self.buffers:
            unpin(buffer)


class Slots:
    """Streams the weights of a run through two slots: the next block is copied while this one computes."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self.order = execution.streamed
        self.ready: dict[int, Any] = {}
        self.free: list[Any] = [None, None]
        for number in self.order[:2]:
            self.copy(number)

    def slot(self, number: int) -> int:
        """Which of the two slots a block goes through."""
        return self.order.index(number) % 2

    def copy(self, number: int) -> None:
        """Begin to copy a block into its slot, as soon as the block before it there has been computed."""
        own, block = self.execution, self.execution.blocks[number]
        assert block.host is not None
        slot = self.slot(number)
        if not own.cuda:
            own.slots[slot][: block.size].copy_(block.host)
            return
        with torch.cuda.stream(own.copying):
            if self.free[slot] is not None:
                own.copying.wait_event(self.free[slot])
            else:
                own.copying.wait_stream(own.stream)
            own.slots[slot][: block.size].copy_(block.host, non_blocking=True)
            self.ready[number] = own.copying.record_event()

    def weights(self, number: int) -> list[Tensor]:
        """Return the weights of a call, for which its computation will wait."""
        block = self.execution.blocks[number]
        if block.host is None:
            return block.tensors
        if self.execution.cuda:
            self.execution.stream.wait_event(self.ready.pop(number))
        return block.views(self.execution.slots[self.slot(number)][: block.size])

    def done(self, number: int) -> None:
        """Note that a call has been started, and begin to copy the block that comes into its slot next."""
        if self.execution.blocks[number].host is None:
            return
        place = self.order.index(number)
        if self.execution.cuda:
            self.free[place % 2] = self.execution.stream.record_event()
        if place + 2 < len(self.order):
            self.copy(self.order[place + 2])
