"""What compilers and engines are to the rest of ditforge. A new compiler is one file and a line in COMPILERS."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from ditforge.errors import UserError
from ditforge.manifest import Component

Arrays = dict[str, np.ndarray]

COMPILERS = {"onnxruntime": "ditforge.engines.ort"}


class Engine(Protocol):
    """A loaded network that can be run."""

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name, each with the batch dimension first."""
        ...


class Compiler(Protocol):
    """A module that compiles one ONNX graph for one device, and loads what it compiled."""

    def version(self) -> str:
        """The version of the compiler, as it goes into the cache key; without importing anything heavy."""
        ...

    def options(self) -> dict[str, str]:
        """Settings that change what comes out, for the cache key."""
        ...

    def check(self, name: str, component: Component, target: str) -> None:
        """Raise UserError, with what would be possible, if `target` cannot execute the component called `name`."""
        ...

    def compile(self, graph: Path, engine: Path) -> list[Path]:
        """Compile the ONNX file `graph` to the file `engine` (a path without suffix); returns the files written."""
        ...

    def load(self, files: list[Path], target: str) -> Engine:
        """Load what `compile` wrote, ready to run on `target`."""
        ...


def find_compiler(name: str) -> Compiler:
    """The compiler called `name`; raises UserError if there is none."""
    if name not in COMPILERS:
        raise UserError(f"unknown compiler {name!r}", f"use one of: {', '.join(COMPILERS)}")
    return import_module(COMPILERS[name])
