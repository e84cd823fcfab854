"""What compilers and engines are to the rest of ditforge. A new compiler is one file and a line in COMPILERS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from ditforge.engines.gpus import Target
from ditforge.errors import UserError
from ditforge.manifest import Component

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]
Ranges = dict[str, tuple[Shape, Shape, Shape]]
Progress = Callable[[str, int, int], None]

COMPILERS = {
    "onnxruntime": "ditforge.engines.compilers.onnxruntime",
    "tensorrt-rtx": "ditforge.engines.compilers.tensorrt_rtx",
    "tensorrt": "ditforge.engines.compilers.tensorrt",
}


@dataclass(frozen=True)
class Job:
    """One network to compile: the ONNX file `graph` into the file `engine` (a path without suffix), for `target`.

    `shapes` has, for each profile, the smallest, best and largest shape of every input that varies. `progress` is
    called with (what is being done, how many steps are done, how many there are). `weights` is the folder in which the
    graph's file of weights is, by default its own.
    """

    name: str
    component: Component
    graph: Path
    engine: Path
    target: Target
    shapes: list[Ranges]
    progress: Progress
    weights: Path | None = None

    @property
    def origin(self) -> Path:
        """A file beside the weights, whether or not there is one of that name."""
        return (self.weights or self.graph.parent) / self.graph.name


class Engine(Protocol):
    """A loaded network that can be run.

    `inputs` and `outputs` are the names of what it takes and gives.
    """

    inputs: list[str]
    outputs: list[str]

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name, each with the batch dimension first."""
        ...

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """The outputs of several requests of equal shapes as one batch. On a GPU, arrays may be of its memory."""
        ...

    def warm_up(self) -> None:
        """Do what would make the first request slow."""
        ...

    def close(self) -> None:
        """Give all memory back. It cannot be run any more; what it returned stays."""
        ...


class Compiler(Protocol):
    """A module that compiles one ONNX graph for one device, and loads what it compiled."""

    PROFILES: bool  # whether engines are for ranges of shapes, rather than for all
    APART: bool  # whether it is run in a process of its own, since it does not give all its memory back

    def version(self) -> str:
        """The version of the compiler, as it goes into the cache key; without importing anything heavy."""
        ...

    def options(self) -> dict[str, str]:
        """Settings that change what comes out, for the cache key."""
        ...

    def check(self, name: str, component: Component, target: Target) -> None:
        """Raise UserError, with what would be possible, if `target` cannot execute the component called `name`."""
        ...

    def compile(self, job: Job) -> list[Path]:
        """Compile a graph; returns the files written."""
        ...

    def load(self, files: list[Path], target: str, version: str) -> Engine:
        """Load what `compile` of the compiler's `version` wrote, to run on `target`.

        Raises UserError if it cannot be run here.
        """
        ...


def find_compiler(name: str) -> Compiler:
    """The compiler called `name`; raises UserError if there is none."""
    if name not in COMPILERS:
        raise UserError(f"unknown compiler {name!r}", f"use one of: {', '.join(COMPILERS)}")
    return import_module(COMPILERS[name])
