"""A compiler in one file, as a package of somebody else's brings it: ONNX Runtime, with the graph left as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnxruntime as ort

from ditforge.engines.compilers import Compiler, Job, LoadedEngine
from ditforge.engines.compilers.onnxruntime import Session, session_options


def version() -> str:
    """ONNX Runtime's."""
    return str(ort.__version__)


def compile(job: Job) -> list[Path]:
    """Copy the graph, and the weights beside it."""
    written = []
    for file in (job.graph, job.graph.with_name(job.graph.name + ".data")):
        if file.is_file():
            written.append(shutil.copyfile(file, job.engine.parent / file.name))
    return written


def load(files: list[Path], target: str, version: str) -> LoadedEngine:
    """Load the graph among the files, and change nothing in it."""
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    graph = next(file for file in files if file.suffix == ".onnx")
    return Session(ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"]))


COMPILER = Compiler(
    name="toy",
    executes={"cpu": ("fp32", "fp16", "int8-weights")},
    version=version,
    compile=compile,
    load=load,
    shapes="any",
)
