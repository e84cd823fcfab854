"""Executes ONNX graphs on a GPU by ONNX Runtime's CUDA provider, on arrays in the GPU's memory.

Arrays are those of CuPy, as with TensorRT, so that engines of both kinds can pass them on. Sources:
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html and
https://onnxruntime.ai/docs/performance/tune-performance/iobinding.html
"""

from __future__ import annotations

import logging
import threading
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditforge import install_hint
from ditforge.engines.compilers import Arrays, Shape
from ditforge.engines.runtime.cuda_provider import CPU, CUDA, check_provider
from ditforge.errors import DitforgeError, UserError

if TYPE_CHECKING:
    import onnxruntime

DEVICE = "cuda"  # in the words of bindings
# Of ONNX Runtime's optimisers, one would store 8-bit weights in 16 bits, and the other takes the scales and shifts of
# norms for vectors, which passes have made [B, 1, D].
LEFT_OUT = ["ConstantFolding", "SkipLayerNormFusion"]
NO_GRAPH = "-1"  # the gpu_graph_id of a run that is neither captured nor replayed
WARM_RUNS = 3  # after which ONNX Runtime has allocated what a graph needs, and captured it
# ONNX Runtime's name of a dtype, its number in ONNX, and NumPy's dtype that stores it: NumPy has no bf16.
DTYPES = {
    "tensor(float)": (1, np.float32),
    "tensor(uint8)": (2, np.uint8),
    "tensor(int8)": (3, np.int8),
    "tensor(int32)": (6, np.int32),
    "tensor(int64)": (7, np.int64),
    "tensor(bool)": (9, np.bool_),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.uint16),
}

log = logging.getLogger(__name__)
_lock = threading.Lock()  # the engines of a process take turns


@dataclass(frozen=True)
class Settings:
    """How a session uses the GPU.

    graphs: of how many sets of input shapes a CUDA graph is kept. ONNX Runtime cannot free one, so the sets that come
        after these are executed without. 0: no graphs.
    memory_limit: the largest number of bytes of the session's arena; None for what the GPU has.
    conv_search: how cuDNN's algorithms are chosen: DEFAULT, HEURISTIC or EXHAUSTIVE.
    conv_workspace: whether convolutions may take all of the memory that they would like.
    shrink: whether memory of activations goes back to the GPU after each call.
    attention: the kernels that attention may use, as ONNX Runtime's sdpa_kernel; None for its own choice.
    profile: the beginning of the path of a profile, which is written when the session is closed.
    """

    graphs: int = 0
    memory_limit: int | None = None
    conv_search: str = "HEURISTIC"
    conv_workspace: bool = False
    shrink: bool = False
    attention: int | None = None
    profile: Path | None = None

    def provider(self) -> dict[str, str]:
        """The options of the CUDA provider."""
        options = {
            "device_id": "0",
            "use_tf32": "0",
            "arena_extend_strategy": "kSameAsRequested",
            "cudnn_conv_algo_search": self.conv_search,
            "cudnn_conv_use_max_workspace": str(int(self.conv_workspace)),
            "enable_cuda_graph": str(int(self.graphs > 0)),
        }
        if self.memory_limit is not None:
            options["gpu_mem_limit"] = str(self.memory_limit)
        if self.attention is not None:
            options["sdpa_kernel"] = str(self.attention)
        return options


def load_session(graph: Path, options: onnxruntime.SessionOptions, settings: Settings | None = None) -> CudaSession:
    """Load a graph onto the GPU. Raises UserError if the CUDA provider cannot be loaded, or CuPy is missing.

    A graph whose operators do not allow CUDA graphs is loaded without them, and the log says so.
    """
    import onnxruntime as ort

    try:
        import cupy
    except ModuleNotFoundError as error:
        raise UserError("executing engines needs cupy, which is not installed", install_hint.install("gpu")) from error
    settings = settings or Settings()
    with redirect_stdout(StringIO()) as said:  # it prints what it cannot find
        ort.preload_dlls()
    check_provider(said.getvalue())
    # Weights are not allocated by the arena, which would keep more.
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    if settings.profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(settings.profile)

    def make(chosen: Settings) -> CudaSession:
        providers = [(CUDA, chosen.provider()), CPU]
        # Without a fallback: it would be the CPU, for a GPU whose memory does not suffice too.
        session = ort.InferenceSession(
            graph, options, providers=providers, disabled_optimizers=LEFT_OUT, enable_fallback=0
        )
        return CudaSession(session, cupy, chosen)

    try:
        return make(settings)
    except Exception as error:  # ONNX Runtime's errors have no common class
        if "graph capture feature" not in str(error):
            raise
        log.warning("%s: no CUDA graphs: %s", graph.name, " ".join(str(error).split())[:300])
        return make(replace(settings, graphs=0))


class CudaSession:
    """An ONNX Runtime session on the GPU as an engine."""

    def __init__(self, session: onnxruntime.InferenceSession, cupy: Any, settings: Settings) -> None:
        self.session: onnxruntime.InferenceSession | None = session
        self.cupy, self.settings = cupy, settings
        self.types = {tensor.name: DTYPES[tensor.type] for tensor in (*session.get_inputs(), *session.get_outputs())}
        self.inputs = [tensor.name for tensor in session.get_inputs()]
        self.outputs = [tensor.name for tensor in session.get_outputs()]
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.graphs: dict[tuple[Shape, ...], Captured] = {}

    def run(self, inputs: Arrays) -> Arrays:
        """Compute the outputs, by name and in the memory of the CPU, for inputs by name."""
        return {name: array.get() for name, array in self.run_batch([inputs]).items()}

    def run_batch(self, parts: list[Arrays]) -> dict[str, Any]:
        """The outputs of several requests as one batch, in the memory of the GPU.

        Inputs are arrays of NumPy or CuPy. A single request's input that is on the GPU is not copied, unless a CUDA
        graph takes it. Raises DitforgeError if the GPU's memory does not suffice.
        """
        assert self.session is not None, "it is closed"
        with _lock, self.stream:
            shapes = tuple(batch_shape([part[name] for part in parts]) for name in self.inputs)
            graph = self.graphs.get(shapes)
            into = graph.inputs if graph else {}
            inputs = {name: self.gather(name, [part[name] for part in parts], into.get(name)) for name in self.inputs}
            self.stream.synchronize()  # ONNX Runtime executes on a stream of its own
            try:
                if graph is None and len(self.graphs) < self.settings.graphs:
                    graph = self.graphs[shapes] = self.capture(inputs)
                if graph is None:
                    return self.execute(inputs)
                self.session.run_with_iobinding(graph.binding, graph.options)
            except Exception as error:  # ONNX Runtime's errors have no common class
                raise out_of_memory(error) or error from None
            return {name: self.copy(array) for name, array in graph.outputs.items()}

    def execute(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Run once; ONNX Runtime allocates the outputs."""
        binding = self.bind(inputs)
        for name in self.outputs:
            binding.bind_output(name, DEVICE, 0)
        assert self.session is not None, "it is closed"
        self.session.run_with_iobinding(binding, self.run_options(NO_GRAPH))
        return {name: self.view(name, value) for name, value in zip(self.outputs, binding.get_outputs(), strict=True)}

    def capture(self, inputs: dict[str, Any]) -> Captured:
        """Record a CUDA graph for inputs of these shapes. It always reads and writes the same memory."""
        outputs = {name: self.cupy.empty_like(array) for name, array in self.execute(inputs).items()}
        held = {name: self.copy(array) for name, array in inputs.items()}
        binding = self.bind(held)
        for name, array in outputs.items():
            binding.bind_output(name, DEVICE, 0, self.types[name][0], array.shape, array.data.ptr)
        self.stream.synchronize()
        captured = Captured(held, outputs, binding, self.run_options(str(len(self.graphs))))
        assert self.session is not None, "it is closed"
        for _ in range(WARM_RUNS):
            self.session.run_with_iobinding(binding, captured.options)
        return captured

    def bind(self, inputs: dict[str, Any]) -> onnxruntime.IOBinding:
        """A binding of the session to inputs in the GPU's memory."""
        assert self.session is not None, "it is closed"
        binding = self.session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, DEVICE, 0, self.types[name][0], array.shape, array.data.ptr)
        return binding

    def run_options(self, graph: str) -> onnxruntime.RunOptions:
        """Options of a run, which belongs to the CUDA graph of this number."""
        import onnxruntime as ort

        options = ort.RunOptions()
        if self.settings.graphs:
            options.add_run_config_entry("gpu_graph_id", graph)
        if self.settings.shrink:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "gpu:0")
        return options

    def gather(self, name: str, parts: list[Any], into: Any) -> Any:
        """Put the parts of an input together as one batch on the GPU: in the array `into`, if there is one."""
        dtype = self.types[name][1]
        alone = parts[0] if len(parts) == 1 and isinstance(parts[0], self.cupy.ndarray) else None
        if into is None and alone is not None and alone.flags.c_contiguous:
            return alone
        batch = self.cupy.empty(batch_shape(parts), dtype) if into is None else into
        start = 0
        for part in parts:
            slot = batch[start : start + len(part)]
            if isinstance(part, self.cupy.ndarray):
                slot[...] = part
            else:
                slot.set(np.ascontiguousarray(part, dtype), stream=self.stream)
            start += len(part)
        return batch

    def view(self, name: str, value: onnxruntime.OrtValue) -> Any:
        """ONNX Runtime's tensor as CuPy's array: the same memory, which lives as long as the array."""
        dtype, shape = np.dtype(self.types[name][1]), tuple(value.shape())
        size = int(np.prod(shape)) * dtype.itemsize
        if not size:
            return self.cupy.empty(shape, dtype)
        memory = self.cupy.cuda.UnownedMemory(value.data_ptr(), size, value)
        return self.cupy.ndarray(shape, dtype, self.cupy.cuda.MemoryPointer(memory, 0))

    def copy(self, array: Any) -> Any:
        """A copy on the GPU, which is there when this returns."""
        copied = array.copy()
        self.stream.synchronize()
        return copied

    def warm_up(self) -> None:
        """Nothing: which sizes will be asked for is not known, and kernels are not compiled."""

    def close(self) -> None:
        """Free the session and its graphs. Arrays that it returned stay valid."""
        with _lock:
            if self.session is not None and self.settings.profile is not None:
                self.session.end_profiling()
            self.graphs.clear()
            self.session = None
            self.cupy.get_default_memory_pool().free_all_blocks()


@dataclass(frozen=True)
class Captured:
    """A CUDA graph: the memory that it reads and writes, and how it is run."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]
    binding: onnxruntime.IOBinding
    options: onnxruntime.RunOptions


def batch_shape(parts: list[Any]) -> Shape:
    """The shape of several arrays as one batch."""
    return (sum(len(part) for part in parts), *parts[0].shape[1:])


def out_of_memory(error: Exception) -> DitforgeError | None:
    """The error for a GPU whose memory does not suffice, if that is what ONNX Runtime says."""
    said = " ".join(str(error).split())
    if not any(sign in said for sign in ("Failed to allocate memory", "out of memory", "Available memory of")):
        return None
    return DitforgeError(
        f"the GPU is out of memory: {said[:300]}",
        "ditforge build ONNX_DIR --gpu GPU --gpu-memory GIB --out DIR   with fewer GiB than it has; ditforge repo",
    )
