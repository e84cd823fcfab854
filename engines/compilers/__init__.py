"""The interface between compilers and the rest of ditforge, and the compilers that are installed.

A compiler is one file here, or in a package of somebody else's, that ends with an object of the class Compiler. An
entry point of the group `ditforge.compilers` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ditforge import entry_points
from ditforge.engines.gpus import Target
from ditforge.engines.memory.memory_plan import Traits
from ditforge.errors import UserError
from ditforge.manifest import Component
from ditforge.option import option
from ditforge.placement import Placement

Arrays = dict[str, NDArray[Any]]
Shape = tuple[int, ...]
NUMPY_DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32, "UINT8": np.uint8}  # of the contract's
Ranges = dict[str, tuple[Shape, Shape, Shape]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One network to compile: the ONNX file `graph` into the file `engine` (a path without suffix), for `target`.

    `shapes` gives, for each profile, the smallest, best and largest shape of every input that varies. `progress` is
    called with (what is being done, how many steps are done, how many there are). `weights` is the folder in which the
    graph's file of weights is, by default its own. With `streams`, the engine has to be able to stream its weights,
    which does not concern compilers whose engines all can, or none can.
    """

    name: str
    component: Component
    graph: Path
    engine: Path
    target: Target
    shapes: list[Ranges]
    progress: Progress
    weights: Path | None = None
    streams: bool = False

    @property
    def origin(self) -> Path:
        """The path of the graph's file as if it lay beside the weights; a parser finds the weights by it."""
        return (self.weights or self.graph.parent) / self.graph.name


class LoadedEngine(Protocol):
    """A loaded network that can be run.

    `inputs` and `outputs` are the names of what it takes and gives.
    """

    inputs: list[str]
    outputs: list[str]

    def run(self, inputs: Arrays) -> Arrays:
        """Run the network: takes inputs by name, and returns outputs by name, each with the batch dimension first."""
        ...

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """Run requests of equal shapes, and return their outputs as one batch. Arrays may be in a GPU's memory."""
        ...

    def warm_up(self) -> None:
        """Do in advance what would make the first request slow."""
        ...

    def close(self) -> None:
        """Give all memory back. The engine cannot be run afterwards, but arrays that it returned stay valid."""
        ...


Check = Callable[[str, Component, Target], None]


def no_check(name: str, component: Component, target: Target) -> None:
    """The check of a compiler that needs none, because its declaration says everything that it cannot do."""


def prepare_nothing(target: str) -> None:
    """What a compiler does in advance whose engines are loaded quickly: nothing."""


@dataclass(frozen=True)
class Compiler:
    """A compiler: it makes an engine of one ONNX graph, and loads the engines that it made.

    name: its name for `--compiler`.
    executes: for each device on which its engines run ("cpu", or a compute capability such as "sm_89") the number
        formats that they compute with there: fp32, fp16, bf16, fp8, fp8-weights, int8-weights.
    version: gives the compiler's version, for the cache key, without importing anything heavy. It raises UserError
        where the compiler is not installed.
    compile: makes an engine, and returns the files written.
    load: takes these files, the device for which they were made, and the version that made them. It raises UserError
        where the engine cannot run on this machine.
    together: makes engines of several networks side by side, each as `compile` does, in processes that it starts, and
        returns the files of each. Whole networks come to it, and segments to `compile`. None where networks are
        compiled one after the other.
    prepare: takes the device of an engine that will be loaded soon, and does in advance what takes long: imports, and
        the GPU's context.
    settings: returns whatever else changes an engine, for the cache key.
    check: raises UserError, with what would be possible, if a component cannot be compiled for a target. What
        `executes` says has been checked before.
    reads: "graph" for the ONNX graph, "programs" for the torch.export programs beside it (see ditforge.regions).
    shapes: "any" where engines take all shapes of a graph, "ranges" where they are made for ranges of them.
    compiles_on: "any machine", or "the target" where the GPU that will execute is needed.
    load_frugally: as `load`, for an engine that takes no more of the GPU's memory than it must. It also takes how many
        bytes of weights stay there; the others are in the machine's memory, and are streamed in each call. None is all
        of them. It raises UserError for an engine that cannot stream. It is None itself where no engine can. Engines of
        programs are streamed as a whole, and of engines of graphs the segments that do not stay.
    libraries: the bytes of the GPU's memory that what runs its engines takes in the process, beside a CUDA context.
    shares_activations: whether the engines of a process use the same memory for their activations, one at a time.
    records_graphs: whether `load` also takes memory for the activations of a CUDA graph.
    holds_weights: whether compiling takes memory for the weights, so that a network may have to be cut for that alone.
    own_process: whether it is run in a process of its own, since it does not give all its memory back.
    triton_backend: the name of Triton's own backend that executes its engines, if there is one.
    keeps: names of files beside the engines that it reads and writes anew in each build, such as a timing cache.
    rank: if several compilers can make an engine, the one with the lowest rank is the default.
    first_on: devices for which it comes before all others nevertheless.
    """

    name: str
    executes: Mapping[str, Collection[str]]
    version: Callable[[], str]
    compile: Callable[[Job], list[Path]]
    load: Callable[[list[Path], str, str], LoadedEngine]
    together: Callable[[Sequence[Job], Progress], list[list[Path]]] | None = None
    prepare: Callable[[str], None] = prepare_nothing
    settings: Callable[[], dict[str, str]] = dict
    check: Check = no_check
    reads: Literal["graph", "programs"] = "graph"
    shapes: Literal["any", "ranges"] = "ranges"
    compiles_on: Literal["any machine", "the target"] = "any machine"
    load_frugally: Callable[[list[Path], str, str, int | None], LoadedEngine] | None = None
    libraries: int = 0
    shares_activations: bool = False
    records_graphs: bool = False
    holds_weights: bool = True
    own_process: bool = False
    triton_backend: str = ""
    keeps: tuple[str, ...] = ()
    rank: int = 100
    first_on: tuple[str, ...] = ()

    @property
    def traits(self) -> Traits:
        """What a plan for a GPU's memory has to know of its engines."""
        return Traits(
            streams=self.load_frugally is not None and self.reads == "programs",
            libraries=self.libraries,
            shares_activations=self.shares_activations,
            records_graphs=self.records_graphs,
        )


def streamed_segments(compiler: Compiler, placement: Placement) -> int:
    """How many segments, counted from the end, stream their weights if they can, instead of being loaded in each call.

    These are the segments that each step needs and that do not stay: there is room for two of them, which is enough.
    """
    return placement.on_demand if compiler.load_frugally is not None and placement.slots > 1 else 0


def find_compiler(name: str) -> Compiler:
    """The compiler called `name`. Raises UserError if there is none."""
    known = entry_points.installed(entry_points.COMPILERS)
    if name not in known:
        near = get_close_matches(name, known, n=1)
        nearest = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown compiler {name!r}{nearest}", f"{option('compiler')} with one of: {', '.join(known)}")
    return entry_points.load(entry_points.COMPILERS, name, Compiler)


def compilers() -> list[Compiler]:
    """All compilers that are installed, by rank."""
    found = [find_compiler(name) for name in entry_points.installed(entry_points.COMPILERS)]
    return sorted(found, key=lambda compiler: (compiler.rank, compiler.name))
