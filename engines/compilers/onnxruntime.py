"""ONNX Runtime as a compiler, for the CPU and for any CUDA GPU. It optimises the graph once, which needs no GPU.

For the CPU its own optimiser does so. For a GPU the passes of engines/compilers/onnx_passes do, since its optimiser
would prepare the graph for the CPU; what it can do for a GPU, it does when the graph is loaded there.
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ditforge import install_hint
from ditforge.engines import gpus
from ditforge.engines.compilers import Arrays, Compiler, Job, LoadedEngine
from ditforge.engines.gpus import CPU, Target
from ditforge.errors import DitforgeError, UserError
from ditforge.manifest import NEXT_COMMAND, Component
from ditforge.option import command
from ditforge.write_errors import check_room

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnxruntime"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # both install the module of the same name
PROVIDERS = ["CPUExecutionProvider"]
EXTERNAL_MIN_BYTES = 1024
PASSES = 1  # another number where the passes give other graphs

log = logging.getLogger(__name__)


def version() -> str:
    """The installed ONNX Runtime's version. Raises UserError if there is none."""
    for package in PACKAGES:
        try:
            return installed_version(package)
        except PackageNotFoundError:
            continue
    raise UserError("ONNX Runtime is not installed", install_hint.install("engines"))


def settings() -> dict[str, str]:
    """The optimisation level. Fusions are done offline. Layouts that suit only one CPU are chosen at loading."""
    return {"optimization": "extended", "quantisation": "computed as floats", "passes for GPUs": str(PASSES)}


def check(name: str, component: Component, target: Target) -> None:
    """Raise UserError for bf16 around FP8 activations, which the CUDA provider does not quantise."""
    if target.capabilities and (component.precision, component.dtype) == ("fp8", "bf16"):
        raise UserError(
            f"{name} is in fp8 with bf16 around it, which {NAME} does not execute on a GPU",
            command("ditforge export CHECKPOINT --precision {} --activations {}   (or fp8-weights)", "fp8", "fp16"),
        )


def compile(job: Job) -> list[Path]:
    """Optimise the graph and write it to ENGINE.onnx, with the weights in ENGINE.onnx.data."""
    path = job.engine.with_name(job.engine.name + ".onnx")
    data = path.with_name(path.name + ".data")
    if job.target.capabilities:
        write_for_gpu(job, path, data)
    else:
        write_for_cpu(job, path, data)
    return [file for file in (path, data) if file.is_file()]


def write_for_gpu(job: Job, path: Path, data: Path) -> None:
    """Apply the passes, and write the weights one after the other."""
    import onnx_ir as ir

    from ditforge.engines.compilers import onnx_passes

    model = onnx_passes.load(job.graph, job.origin.parent)
    counts = onnx_passes.apply(model)
    log.debug("%s: %s", job.name, ", ".join(f"{name} {count}" for name, count in counts.items() if count))

    def report(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        job.progress(f"{job.name}: weights", info.index + 1, info.total)

    ir.save(model, path, external_data=data.name, size_threshold_bytes=EXTERNAL_MIN_BYTES, callback=report)


def write_for_cpu(job: Job, path: Path, data: Path) -> None:
    """Let ONNX Runtime optimise the graph for the CPU, and write it."""
    import onnxruntime as ort

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


def prepare_to_load(target: str) -> None:
    """Import ONNX Runtime, and for a GPU what loads engines there."""
    import onnxruntime  # noqa: F401

    if target != CPU:
        from ditforge.engines.runtime import onnxruntime_cuda  # noqa: F401


def load(files: list[Path], target: str, built_with: str) -> LoadedEngine:
    """Load the optimised graph among `files`. Raises UserError if there is none, or no GPU of the target."""
    import onnxruntime as ort

    path = next((file for file in files if file.suffix == ".onnx"), None)
    if path is None:
        there = ", ".join(file.name for file in files)
        again = f"{NEXT_COMMAND['engines']}   again"
        raise UserError(f"an engine of onnxruntime is a file .onnx, and {there} is none", again)
    if target == CPU:
        return Session(ort.InferenceSession(path, session_options(), providers=PROVIDERS))
    from ditforge.engines.runtime.cuda_provider import check_here
    from ditforge.engines.runtime.onnxruntime_cuda import load_session

    check_here(path, NAME, target)
    return load_session(path, session_options())


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
    name=NAME,
    # On a CPU it has no kernels for bf16.
    executes={
        CPU: ("fp32", "fp16", "fp8", "fp8-weights", "int8-weights"),
        **{capability: tuple(gpus.precisions(capability)) for capability in gpus.PRODUCTS},
    },
    version=version,
    settings=settings,
    check=check,
    compile=compile,
    load=load,
    prepare=prepare_to_load,
    shapes="any",
    libraries=2**30,  # an H100: 1.5 and 1.7 GiB in all with five and six small engines, of 0.1 GiB themselves
    holds_weights=False,
    rank=50,
    first_on=(CPU,),
)
