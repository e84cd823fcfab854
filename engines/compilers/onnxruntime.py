"""ONNX Runtime as a compiler: it optimises the graph once, offline, and executes it on the CPU."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ditforge import install_hint
from ditforge.engines.compilers import Arrays, Compiler, Job
from ditforge.errors import DitforgeError, UserError
from ditforge.manifest import NEXT_COMMAND
from ditforge.write_errors import check_room

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = ["CPUExecutionProvider"]
EXTERNAL_MIN_BYTES = 1024


def version() -> str:
    """The installed ONNX Runtime's version. Raises UserError if there is none."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return installed_version(package)
        except PackageNotFoundError:
            continue
    raise UserError("ONNX Runtime is not installed", install_hint.install("engines"))


def settings() -> dict[str, str]:
    """The optimisation level. Fusions are done offline. Layouts that suit only one CPU are chosen at loading."""
    return {"optimization": "extended", "quantisation": "computed as floats"}


def compile(job: Job) -> list[Path]:
    """Optimise the graph and write it to ENGINE.onnx, with the weights in ENGINE.onnx.data."""
    import onnxruntime as ort

    path = job.engine.with_name(job.engine.name + ".onnx")
    data = path.with_name(path.name + ".data")
    chosen = session_options()
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    chosen.optimized_model_filepath = str(path)
    chosen.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
    chosen.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(EXTERNAL_MIN_BYTES)
    )
    try:
        chosen.add_session_config_entry("session.model_external_initializers_file_folder_path", str(job.origin.parent))
        ort.InferenceSession(job.graph.read_bytes(), chosen, providers=PROVIDERS)
    except Exception as error:  # ONNX Runtime's errors have no common class
        check_room(path.parent, sum(file.size for file in job.component.files.values()))
        reason = " ".join(str(error).split())[:1000]
        raise DitforgeError(f"ONNX Runtime cannot compile {job.name}: {reason}", "report it with the export") from error
    return [file for file in (path, data) if file.is_file()]


def load(files: list[Path], target: str, version: str) -> Session:
    """Load the optimised graph among `files`. Raises UserError if there is none."""
    import onnxruntime as ort

    path = next((file for file in files if file.suffix == ".onnx"), None)
    if path is None:
        there = ", ".join(file.name for file in files)
        again = f"{NEXT_COMMAND['engines']}   again"
        raise UserError(f"an engine of onnxruntime is a file .onnx, and {there} is none", again)
    return Session(ort.InferenceSession(path, session_options(), providers=PROVIDERS))


def session_options() -> onnxruntime.SessionOptions:
    """Options for all sessions. Only errors are logged. Idle threads do not spin, because Triton needs the cores."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Q/DQ pairs are computed as they stand: rewritten into integer products, those of FP8 are invalid.
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    return settings


class Session:
    """An ONNX Runtime session as an engine."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session: onnxruntime.InferenceSession | None = session
        self.inputs = [tensor.name for tensor in session.get_inputs()]
        self.outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name."""
        assert self.session is not None, "it is closed"
        return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))

    def run_batch(self, parts: list[Arrays]) -> Arrays:
        """The outputs of several requests as one batch; a single request's inputs are not copied."""
        if len(parts) == 1:
            return self.run(parts[0])
        return self.run({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def warm_up(self) -> None:
        """Nothing: the graph was optimised when it was compiled."""

    def close(self) -> None:
        """Drop the session, which frees its memory."""
        self.session = None


COMPILER = Compiler(
    name="onnxruntime",
    # On a CPU it has no kernels for bf16.
    executes={"cpu": ("fp32", "fp16", "fp8", "fp8-weights", "int8-weights")},
    version=version,
    settings=settings,
    compile=compile,
    load=load,
    shapes="any",
    rank=0,
)
