"""ONNX Runtime: the graph is optimised once, offline, and executed on the CPU."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

from ditforge.errors import UserError
from ditforge.manifest import Component

if TYPE_CHECKING:
    import onnxruntime

    from ditforge.engines.compiler import Arrays

PROVIDERS = ["CPUExecutionProvider"]
EXTERNAL_MIN_BYTES = 1024


def version() -> str:
    """The installed ONNX Runtime's version. Raises UserError if there is none."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return installed_version(package)
        except PackageNotFoundError:
            continue
    raise UserError("ONNX Runtime is not installed", "pip install 'ditforge[engines]'")


def options() -> dict[str, str]:
    """The optimisation level: fusions are done offline, layouts that suit one CPU only are left to loading."""
    return {"optimization": "extended"}


def check(name: str, component: Component, target: str) -> None:
    """Refuse bf16: ONNX Runtime has no kernels for it on a CPU."""
    if component.precision == "bf16":
        raise UserError(
            f"{name} is exported in bf16, which ONNX Runtime cannot execute on a CPU",
            "ditforge export CHECKPOINT --precision fp32   (or fp16)",
        )


def compile(graph: Path, engine: Path) -> list[Path]:
    """Optimise `graph` and write it to `engine`.onnx, with the weights in `engine`.onnx.data."""
    import onnxruntime as ort

    path = engine.with_name(engine.name + ".onnx")
    data = path.with_name(path.name + ".data")
    settings = session_options()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    settings.optimized_model_filepath = str(path)
    settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
    settings.add_session_config_entry(
        "session.optimized_model_external_initializers_min_size_in_bytes", str(EXTERNAL_MIN_BYTES)
    )
    ort.InferenceSession(graph, settings, providers=PROVIDERS)
    return [file for file in (path, data) if file.is_file()]


def load(files: list[Path], target: str) -> Session:
    """Load the optimised graph among `files`."""
    import onnxruntime as ort

    path = next(file for file in files if file.suffix == ".onnx")
    return Session(ort.InferenceSession(path, session_options(), providers=PROVIDERS))


def session_options() -> onnxruntime.SessionOptions:
    """Options for all sessions: only errors are logged; idle threads do not spin, since Triton needs the cores."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return settings


class Session:
    """An ONNX Runtime session as an engine."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.outputs = [output.name for output in session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:
        """Outputs by name for inputs by name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, inputs), strict=True))
