"""Executes plans of TensorRT and TensorRT-RTX by the vendor's sequence of calls, and checks every return value.

Arrays are those of CuPy, which exchange memory with Triton by DLPack. Sources: "Perform Inference" in both developer
guides, "Weight Streaming" too, "Working with Runtime Cache" and "Working with RTX CUDA Graphs" in TensorRT-RTX's, and
https://github.com/triton-inference-server/python_backend#interoperability-and-gpu-support
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import threading
import warnings
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from ditforge import install_hint
from ditforge.cache import default_cache
from ditforge.engines.compilers import Arrays, Shape
from ditforge.engines.compilers.tensorrt_common import NO_DRIVER, make_log
from ditforge.engines.memory.memory_plan import SLOTS
from ditforge.engines.runtime.ranges import find_range
from ditforge.errors import DitforgeError, DitforgeWarning, UserError
from ditforge.local_gpu import why_not_here
from ditforge.option import command

REBUILD = "ditforge build ONNX_DIR --gpu GPU --out DIR   again, and then ditforge repo"
logger = logging.getLogger(__name__)
_lock = threading.Lock()  # the engines of a process take turns, and so
_scratch: Any = None  # share the memory of their activations, which is as large
_loaded: WeakSet[Execution] = WeakSet()  # as the one of these needs that needs the most


def check_here(plan: Path, compiler: str, target: str, built_with: str, version: str) -> None:
    """Raise UserError, with the command to build again, if the plan is for another version or another GPU."""
    again = "ditforge build ONNX_DIR --gpu local --compiler {} --out DIR   and then ditforge repo"
    rebuild = command(again, compiler)
    if built_with and built_with != version:
        raise UserError(f"{plan} was compiled by {compiler} {built_with}, and {version} is installed", rebuild)
    if why := why_not_here([target]):
        raise UserError(f"engines like {plan} do not run here: {why}", f"a machine with {target}; or {rebuild}")


def load_plan(
    trt: Any, plan: Path, compiler: str, target: str, budget: int | None = None, graphs: bool = True
) -> Execution:
    """Load a plan onto the GPU: all of its weights, or about `budget` bytes of them, and it streams the others.

    With `graphs`, an engine for one shape is captured in a CUDA graph. Raises DitforgeError if the plan cannot be
    loaded, and UserError if it cannot stream.
    """
    make_room()
    log = make_log(trt)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        said = [error for error in log.errors if NO_DRIVER not in error] or log.errors
        raise DitforgeError(
            f"{compiler} {trt.__version__} cannot load {plan}: {' '.join('; '.join(said).split())}",
            command("ditforge build ONNX_DIR --gpu {} --compiler {} --out DIR   again", target, compiler),
        )
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise UserError("executing engines needs cupy, which is not installed", install_hint.install("gpu")) from error
    if budget is not None:
        stream(engine, budget, plan)
    return Execution(trt, cupy, runtime, engine, log, kernels_of(plan), graphs)


def stream(engine: Any, budget: int, plan: Path) -> None:
    """Let an engine keep `budget` bytes of weights on the GPU, and stream the others from the machine's memory.

    It must be done before there is a context. Raises UserError if the engine cannot stream, or needs more room for it
    than two engines like it take.
    """
    size = int(getattr(engine, "streamable_weights_size", 0))  # 0 for an engine that was not compiled for it
    if not size:
        raise UserError(f"{plan} was not compiled to stream its weights", REBUILD)
    engine.weight_streaming_budget_v2 = wanted = min(budget, size)
    if engine.weight_streaming_budget_v2 != wanted:  # setting it raises nothing
        raise UserError(f"{plan} does not stream its weights with {wanted} bytes of them on the GPU", REBUILD)
    room, planned = int(engine.weight_streaming_scratch_memory_size), SLOTS * plan.stat().st_size
    if room > planned:
        raise UserError(
            f"{plan} needs {room} bytes on the GPU to stream its weights, and {planned} are planned", REBUILD
        )
    logger.info("%s streams %d of %d bytes of weights, and takes %d for it", plan, size - wanted, size, room)


def make_room() -> None:
    """Free the memory of activations, unless an engine computes: what is loaded next may need the room for weights."""
    global _scratch
    if not _lock.acquire(blocking=False):
        return
    try:
        if _scratch is not None:
            import cupy

            _scratch = None
            cupy.get_default_memory_pool().free_all_blocks()
    finally:
        _lock.release()


def kernels_of(plan: Path) -> Path:
    """The file that keeps TensorRT-RTX's kernels for a plan and this machine's GPU.

    It is not beside the plan, whose folder may be read-only. If another plan takes the place of this one, the file has
    kernels of the old plan, which TensorRT-RTX notices.
    """
    digest = hashlib.sha256(os.fsencode(plan.resolve())).hexdigest()[:16]
    return default_cache() / "runtime-caches" / f"{plan.stem}-{digest}.runtime-cache"


class Execution:
    """A plan on the GPU with one execution context."""

    def __init__(
        self, trt: Any, cupy: Any, runtime: Any, engine: Any, log: Any, cache: Path, graphs: bool = True
    ) -> None:
        self.cupy, self.runtime, self.engine, self.log, self.cache = cupy, runtime, engine, log, cache
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        self.inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if name not in self.inputs]
        self.dtypes = {name: stored_as(trt, engine.get_tensor_dtype(name)) for name in names}
        self.profiles = [
            {name: tuple(map(tuple, engine.get_tensor_profile_shape(name, i))) for name in self.inputs}
            for i in range(engine.num_optimization_profiles)
        ]
        # CUDA graphs replay addresses, so that static engines keep their arrays, by name and shape.
        self.static = all(low[1:] == high[1:] for profile in self.profiles for low, _, high in profile.values())
        self.kept: dict[tuple[str, Shape], Any] = {}
        self.stream = cupy.cuda.Stream(non_blocking=True)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.runtime_cache, self.on_disk = None, b""
        if hasattr(config, "create_runtime_cache"):  # TensorRT-RTX
            self.runtime_cache = config.create_runtime_cache()
            if cache.is_file():
                self.on_disk = cache.read_bytes()
                self.runtime_cache.deserialize(self.on_disk)  # refuses another GPU's or version's: then it is empty
            self.check(config.set_runtime_cache(self.runtime_cache), "set_runtime_cache")
            if self.static and graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.context = engine.create_execution_context(config)
        self.check(self.context is not None, "create_execution_context")
        self.activations = max(int(engine.device_memory_size_v2), 1)  # bytes
        self.scratch = 0, 0  # where its activations are, and how many bytes are there
        _loaded.add(self)

    def check(self, done: object, call: str) -> None:
        """Raise DitforgeError, with what the runtime said, if a call did not return true."""
        if not done:
            said = " ".join("; ".join(self.log.errors[-3:]).split())
            raise DitforgeError(f"TensorRT failed in {call}: {said}", "look at the driver's log: dmesg, nvidia-smi")

    def run(self, inputs: Arrays) -> Arrays:
        """Compute the outputs, by name and in the memory of the CPU, for inputs by name."""
        return {name: array.get() for name, array in self.run_batch([inputs]).items()}

    def run_batch(self, parts: list[Arrays]) -> dict[str, Any]:
        """The outputs of several requests as one batch, in the memory of the GPU.

        Inputs are arrays of NumPy or CuPy. A single request whose input is on the GPU already is not copied, unless the
        engine's shapes are static.
        """
        with _lock, self.stream:
            inputs = {name: self.gather(name, [part[name] for part in parts]) for name in self.inputs}
            self.choose_profile({name: array.shape for name, array in inputs.items()})
            self.share_scratch()
            for name, array in inputs.items():
                self.check(self.context.set_input_shape(name, array.shape), f"set_input_shape of {name}")
                self.check(self.context.set_tensor_address(name, array.data.ptr), f"set_tensor_address of {name}")
            outputs = {name: self.array(name, tuple(self.context.get_tensor_shape(name))) for name in self.outputs}
            for name, array in outputs.items():
                self.check(self.context.set_tensor_address(name, array.data.ptr), f"set_tensor_address of {name}")
            self.check(self.context.execute_async_v3(self.stream.ptr), "execute_async_v3")
            if self.static:
                outputs = {name: self.copy(array) for name, array in outputs.items()}
            self.stream.synchronize()
        return outputs

    def array(self, name: str, shape: Shape) -> Any:
        """Uninitialised memory on the GPU. A static engine gets the same memory each time."""
        key = (name, shape)
        if key in self.kept:
            return self.kept[key]
        array = self.cupy.empty(shape, self.dtypes[name])
        if self.static:
            self.kept[key] = array
        return array

    def copy(self, array: Any) -> Any:
        """A copy on the GPU."""
        copied = self.cupy.empty(array.shape, array.dtype)
        copied.data.copy_from_device_async(array.data, array.nbytes, self.stream)
        return copied

    def gather(self, name: str, parts: list[Any]) -> Any:
        """Put the parts of an input together as one batch on the GPU."""
        if len(parts) == 1 and isinstance(parts[0], self.cupy.ndarray) and not self.static:
            return parts[0]
        batch = self.array(name, (sum(len(part) for part in parts), *parts[0].shape[1:]))
        start = 0
        for part in parts:
            slot = batch[start : start + len(part)]
            if isinstance(part, self.cupy.ndarray):
                slot.data.copy_from_device_async(part.data, part.nbytes, self.stream)
            else:
                slot.set(np.ascontiguousarray(part, self.dtypes[name]), stream=self.stream)
            start += len(part)
        return batch

    def choose_profile(self, shapes: dict[str, Shape]) -> None:
        """Switch to the first profile that takes the shapes. Raises UserError if none does."""
        bounds = [{name: (low, high) for name, (low, _, high) in profile.items()} for profile in self.profiles]
        number = find_range(bounds, shapes)
        if self.context.active_optimization_profile != number:
            done = self.context.set_optimization_profile_async(number, self.stream.ptr)
            self.check(done, "set_optimization_profile")

    def share_scratch(self) -> None:
        """Give the context the memory for activations that this process's engines share, and enlarge it if needed.

        It is not kept here: an engine that waits would hold what has been too small for another one.
        """
        global _scratch
        if _scratch is None or _scratch.size < self.activations:
            _scratch = None  # before there is another one
            self.cupy.get_default_memory_pool().free_all_blocks()
            _scratch = self.cupy.empty(self.activations, np.uint8)
        if self.scratch != (place := (_scratch.data.ptr, _scratch.size)):
            self.context.set_device_memory(*place)
            self.scratch = place

    def warm_up(self) -> None:
        """Run every profile's best shapes on zeros, so that kernels are compiled and kept before the first request."""
        for profile in self.profiles:
            self.run_batch([{name: np.zeros(best, self.dtypes[name]) for name, (_, best, _) in profile.items()}])
        self.keep_kernels()

    def keep_kernels(self) -> None:
        """Write the kernels that were compiled for the GPU to disk, unless they are there already."""
        kernels = bytes(self.runtime_cache.serialize()) if self.runtime_cache is not None else b""
        if len(kernels) == len(self.on_disk):  # their order may differ from one time to the next
            return
        temporary = self.cache.with_name(f".{self.cache.name}.{os.getpid()}")
        try:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(kernels)
            temporary.replace(self.cache)
            self.on_disk = kernels
        except OSError as error:
            why = f"{self.cache} cannot be written ({error.strerror}): the next start compiles again"
            warnings.warn(why, DitforgeWarning, stacklevel=2)

    def close(self) -> None:
        """Free the engine and its context, what CuPy has kept, and the shared memory if it alone needed so much."""
        global _scratch
        with _lock:
            self.keep_kernels()
            self.context = self.engine = self.runtime_cache = self.runtime = None  # an engine goes after its context
            self.kept.clear()
            _loaded.discard(self)
            if _scratch is not None and _scratch.size > max((one.activations for one in _loaded), default=0):
                _scratch = None
            self.cupy.get_default_memory_pool().free_all_blocks()


def stored_as(trt: Any, dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype that stores TensorRT's dtype. NumPy lacks bf16, which is stored as two bytes."""
    return np.dtype(np.uint16 if dtype == trt.bfloat16 else trt.nptype(dtype))
