"""What TensorRT and TensorRT-RTX share. Their APIs are the same but for the name of the module, here `trt`.

Source: the Python API references at docs.nvidia.com/deeplearning/tensorrt and .../tensorrt-rtx.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from ditforge import install_hint
from ditforge.engines.compilers import Job, Progress, Ranges
from ditforge.errors import DitforgeError, UserError
from ditforge.manifest import Tensor

NO_DRIVER = "CUDA driver version is insufficient"  # said of every machine without a GPU, whatever the error was


def installed(name: str, packages: tuple[str, ...], extra: str, instead: str) -> str:
    """The version of the first of the packages that is installed.

    Raises UserError if none is, and says how to install ditforge's `extra`, or the package `instead`.
    """
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    raise UserError(f"{name} is not installed", f"{install_hint.install(extra)}   (or {instead})")


class Build:
    """The compilation of one ONNX file into a plan: set `config`, and then call `write`."""

    def __init__(self, trt: Any, job: Job) -> None:
        """Parse the graph, and check that it is what the manifest says. Raises DitforgeError if it cannot be parsed."""
        self.trt, self.job = trt, job
        self.log = make_log(trt)
        self.builder = trt.Builder(self.log)
        self.network = self.builder.create_network(strongly_typed(trt))
        parser = trt.OnnxParser(self.network, self.log)
        if not parser.parse(job.graph.read_bytes(), str(job.origin)):
            errors = [parser.get_error(i) for i in range(parser.num_errors)]
            raise self.failure("parse", [f"{e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors])
        check_ports(trt, self.network, job)
        allow_unfused_attention(trt, self.network)
        self.config = self.builder.create_builder_config()
        if job.streams and hasattr(trt.BuilderFlag, "WEIGHT_STREAMING"):  # TensorRT 10.1 and newer
            self.config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        for shapes in job.shapes:
            if self.config.add_optimization_profile(self.profile(shapes)) < 0:
                raise self.failure(f"take the shapes {shapes} for", self.log.errors)

    def profile(self, shapes: Ranges) -> Any:
        """An optimisation profile of the inputs' smallest, best and largest shapes."""
        profile = self.builder.create_optimization_profile()
        for name, (smallest, best, largest) in shapes.items():
            profile.set_shape(name, smallest, best, largest)
        return profile

    def write(self) -> Path:
        """Compile, and write ENGINE.plan as it is made. Raises DitforgeError, or OSError if it cannot be written."""
        path = self.job.engine.with_name(self.job.engine.name + ".plan")
        with path.open("wb") as file:
            writer = make_writer(self.trt, file)
            self.config.progress_monitor = monitor = make_monitor(self.trt, self.job.progress, self.job.name)
            built = self.builder.build_serialized_network_to_stream(self.network, self.config, writer)
        for error in (monitor.error, writer.error):
            if error is not None:
                raise error
        if not (built and path.stat().st_size):
            raise self.failure("compile", self.log.errors)
        return path

    def failure(self, verb: str, errors: list[str]) -> DitforgeError:
        """The error for a step that failed, with what the compiler said about it."""
        said = [error for error in dict.fromkeys(errors) if NO_DRIVER not in error] or errors
        reason = " ".join("; ".join(said).split())[:1000]
        return DitforgeError(
            f"{self.trt.__name__} {self.trt.__version__} cannot {verb} {self.job.name} for {self.job.target}: {reason}",
            "look for the error in the vendor's release notes, or report it with the export",
        )


def strongly_typed(trt: Any) -> int:
    """Flags of a network in which the graph alone decides what is computed in; TensorRT 11 has no other networks."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def allow_unfused_attention(trt: Any, network: Any) -> None:
    """Let attention that has no kernel of its own on the GPU be computed by several kernels.

    The parser would let the build fail. So it is with heads of 512 channels, as autoencoders have them, on every GPU.
    Older TensorRTs have no such layer.
    """
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' own way to cast a layer
            layer.attention.decomposable = True


def check_ports(trt: Any, network: Any, job: Job) -> None:
    """Raise DitforgeError if inputs or outputs are not those of the manifest, in name, dtype or shape."""
    names = {
        trt.float32: "FP32",
        trt.float16: "FP16",
        trt.bfloat16: "BF16",
        trt.int32: "INT32",
        trt.int64: "INT64",
        trt.uint8: "UINT8",
    }
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    for found, described in ((inputs, job.component.inputs), (outputs, job.component.outputs)):
        seen = {tensor.name: (names.get(tensor.dtype), tuple(tensor.shape)) for tensor in found}
        wanted = {name: (tensor.dtype, fixed(tensor)) for name, tensor in described.items()}
        if seen != wanted:
            raise DitforgeError(f"{job.graph} has {seen}, the manifest says {wanted}", "export again")


def fixed(tensor: Tensor) -> tuple[int, ...]:
    """A shape in TensorRT's notation, with -1 for a dimension that varies."""
    return tuple(dim if isinstance(dim, int) else -1 for dim in tensor.shape)


def make_log(trt: Any) -> Any:
    """A logger that keeps all errors in its attribute `errors`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Log()


def make_writer(trt: Any, file: BinaryIO) -> Any:
    """A stream to write the plan to. It keeps a failure in `error`, because the compiler does not notice one."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()


def make_monitor(trt: Any, progress: Progress, name: str) -> Any:
    """A monitor that reports the compiler's phases. If reporting raises, it cancels, and keeps the error in `error`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                progress(f"{name}: {phase}", step + 1, self.steps[phase])
            except BaseException as error:
                self.error = error
            return self.error is None

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()
