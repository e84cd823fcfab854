"""The calls of an execution, on stand-ins for TensorRT's objects, which need a GPU, and for CuPy.

The stand-ins answer only to what TensorRT-RTX's real classes have, with as many arguments, and its enumerations and
dtypes are the real ones. benchmarks/tensorrt_runtime.py shows the same behaviour with real plans on a real GPU.
"""

from __future__ import annotations

import re
import sys
import weakref
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx as trt

from ditforge.engines.compilers import tensorrt, tensorrt_rtx
from ditforge.engines.runtime import tensorrt as tensorrt_runtime
from ditforge.engines.runtime.tensorrt import Execution
from ditforge.errors import DitforgeError, DitforgeWarning, UserError


class Array(np.ndarray):
    """NumPy's array with what is used of CuPy's; `data.ptr` is an address that `MEMORY` finds it by."""

    def set(self, value: np.ndarray, stream: object = None) -> None:
        self[...] = value

    def get(self) -> np.ndarray:
        return np.array(self)


class Pointer:
    def __init__(self, array: np.ndarray) -> None:
        self.array, self.ptr = array, array.__array_interface__["data"][0]

    def copy_from_device_async(self, source: Pointer, size: int, stream: object) -> None:
        assert size == source.array.nbytes == self.array.nbytes
        self.array[...] = source.array


Array.data = property(Pointer)  # type: ignore[assignment,method-assign]


class Stream:
    ptr = 7

    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...


FREED: list[object] = []  # the shared scratch at each time that memory was given back to the driver
MADE: list[weakref.ref[Array]] = []  # all arrays that were made


def empty(shape: Any, dtype: Any) -> Array:
    array = np.full(shape, 77, dtype).view(Array)
    MADE.append(weakref.ref(array))
    return array


CUPY = SimpleNamespace(
    ndarray=Array,
    cuda=SimpleNamespace(Stream=Stream),
    empty=empty,
    get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: FREED.append(tensorrt_runtime._scratch)),
)


class Real:
    """A stand-in behind the interface of the real class: the same names, as many arguments, None where that returns it.

    Anything else raises AssertionError or AttributeError.
    """

    def __init__(self, stand_in: Any, interface: type) -> None:
        self.__dict__.update(_stand_in=stand_in, _interface=interface)

    def __setattr__(self, name: str, value: object) -> None:
        assert isinstance(vars(self._interface)[name], property)
        setattr(self._stand_in, name, value)

    def __getattr__(self, name: str) -> Any:
        documented, value = getattr(self._interface, name), getattr(self._stand_in, name)
        if isinstance(documented, property):
            return value

        def call(*arguments: object) -> Any:
            made = value(*arguments)
            if "Overloaded function" not in documented.__doc__:
                found = re.match(r"\s*\w+\(self: [\w.]+(.*)\) -> (.*)", documented.__doc__)
                assert found, documented.__doc__
                parameters = re.split(r", (?=\w+: )", found[1])[1:]
                least = sum("=" not in parameter for parameter in parameters)
                assert least <= len(arguments) <= len(parameters), f"{name} takes {found[1]}"
                assert (made is None) == (found[2].strip() == "None"), f"{name} returns {found[2]}"
            return made

        return call


class Context:
    """Doubles `x` into `y`, through the addresses it was given."""

    def __init__(self) -> None:
        self.active_optimization_profile = 0
        self.calls: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: list[tuple[int, int]] = []
        self.fails = ""

    def set_device_memory(self, address: int, size: int) -> None:
        self.memory.append((address, size))

    def set_optimization_profile_async(self, i: int, stream: int) -> bool:
        assert stream == Stream.ptr
        self.active_optimization_profile = i
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.fails != "set_input_shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> trt.Dims:
        return trt.Dims(self.shapes["x"])

    def execute_async_v3(self, stream: int) -> bool:
        x, y = (self.view(name) for name in ("x", "y"))
        y[...] = 2 * x
        self.calls.append(f"profile {self.active_optimization_profile}, {x.shape}")
        return self.fails != "execute_async_v3"

    def view(self, name: str) -> np.ndarray:
        count = int(np.prod(self.shapes["x"]))
        buffer = (np.ctypeslib.ctypes.c_float * count).from_address(self.addresses[name])
        return np.ctypeslib.as_array(buffer).reshape(self.shapes["x"])


class Cache:
    """Kernels that have been compiled; `read` is what it was given from an earlier time."""

    def __init__(self) -> None:
        self.kernels = b"kernels"
        self.read: list[bytes] = []

    def deserialize(self, kernels: bytes) -> bool:
        self.read.append(kernels)
        return True

    def serialize(self) -> bytes:
        return self.kernels


class Config:
    cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED

    def __init__(self) -> None:
        self.cache = Cache()

    def set_execution_context_allocation_strategy(self, strategy: trt.ExecutionContextAllocationStrategy) -> None:
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED

    def create_runtime_cache(self) -> Real:
        return Real(self.cache, trt.IRuntimeCache)

    def set_runtime_cache(self, cache: object) -> bool:
        return True


class Engine:
    num_io_tensors = 2
    device_memory_size_v2 = 1000

    def __init__(self, *profiles: tuple[Any, Any, Any]) -> None:
        self.profiles, self.context, self.config = profiles, Context(), Config()
        self.num_optimization_profiles = len(profiles)

    def get_tensor_name(self, i: int) -> str:
        return ("x", "y")[i]

    def get_tensor_mode(self, name: str) -> trt.TensorIOMode:
        return trt.TensorIOMode.INPUT if name == "x" else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> trt.DataType:
        return trt.float32

    def get_tensor_profile_shape(self, name: str, i: int) -> list[trt.Dims]:
        return [trt.Dims(shape) for shape in self.profiles[i]]

    def create_runtime_config(self) -> Real:
        return Real(self.config, trt.IRuntimeConfig)

    def create_execution_context(self, config: Real) -> Real | None:
        return Real(self.context, trt.IExecutionContext)


class Streaming(Engine):
    """An engine that can stream `streamable_weights_size` bytes of weights, in some room for it.

    It takes budgets of up to `most` bytes, and ignores larger ones, as the real setter does where memory runs out.
    """

    streamable_weights_size = 400
    weight_streaming_scratch_memory_size = 200
    most = 400

    def __init__(self, *profiles: tuple[Any, Any, Any]) -> None:
        super().__init__(*profiles)
        self.budget = self.streamable_weights_size

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, budget: int) -> None:
        self.budget = budget if budget <= self.most else self.budget

    @property
    def device_memory_size_v2(self) -> int:  # type: ignore[override]
        streams = self.budget < self.streamable_weights_size
        return 1000 + streams * self.weight_streaming_scratch_memory_size

    def create_execution_context(self, config: Real) -> Real | None:
        self.most = -1  # from now on, a budget is refused
        return super().create_execution_context(config)


def load(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None) -> Execution:
    """A plan of 500 bytes, which is this engine."""
    plan = tmp_path / "dit-2.plan"
    plan.write_bytes(bytes(500))
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: Real(engine, trt.ICudaEngine))
    monkeypatch.setattr(trt, "Runtime", lambda log: runtime)
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    return tensorrt_runtime.load_plan(trt, plan, "tensorrt-rtx", "sm_89", budget, graphs=False)


@pytest.fixture(autouse=True)
def no_memory_yet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where engines that are closed leave what was compiled
    MADE.clear()  # an error that a test before this one caught may still hold its arrays
    monkeypatch.setattr(tensorrt_runtime, "_scratch", None)
    monkeypatch.setattr(tensorrt_runtime, "_loaded", weakref.WeakSet())


def execution(engine: Engine, cache: Path = Path("nowhere"), graphs: bool = True) -> Execution:
    log = SimpleNamespace(errors=["what the runtime said"])
    return Execution(trt, CUPY, None, Real(engine, trt.ICudaEngine), log, cache, graphs)


def x(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


RANGE = ((1, 2), (1, 4), (4, 8))


def test_requests_run_as_one_batch() -> None:
    engine = Engine(RANGE)
    parts = [x(1, 4), x(2, 4) + 10]
    out = execution(engine).run_batch([{"x": part} for part in parts])
    np.testing.assert_array_equal(out["y"], 2 * np.concatenate(parts))
    assert engine.context.calls == ["profile 0, (3, 4)"]
    np.testing.assert_array_equal(execution(engine).run({"x": x(1, 2)})["y"], 2 * x(1, 2))


def test_what_is_on_the_gpu_is_not_copied() -> None:
    engine = Engine(RANGE)
    there = x(1, 4).view(Array)
    execution(engine).run_batch([{"x": there}])
    assert engine.context.addresses["x"] == there.data.ptr


def test_static_shapes_keep_their_addresses_and_are_captured() -> None:
    engine = Engine(((1, 4), (1, 4), (2, 4)), ((1, 8), (1, 8), (2, 8)))
    run = execution(engine)
    assert engine.config.cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    first = run.run_batch([{"x": x(1, 4).view(Array)}])["y"]
    addresses = dict(engine.context.addresses)
    second = run.run_batch([{"x": x(1, 4).view(Array) + 1}])["y"]
    assert engine.context.addresses == addresses
    assert engine.context.memory == engine.context.memory[:1]
    np.testing.assert_array_equal(first, 2 * x(1, 4))  # not what the second call wrote
    np.testing.assert_array_equal(second, 2 * x(1, 4) + 2)
    run.run({"x": x(2, 8)})
    assert engine.context.calls[-1] == "profile 1, (2, 8)"
    for others, graphs in ((Engine(RANGE), True), (Engine(((1, 4), (1, 4), (2, 4))), False)):
        execution(others, graphs=graphs)
        assert others.config.cuda_graph_strategy == trt.CudaGraphStrategy.DISABLED


def test_shapes_out_of_range_are_refused() -> None:
    run = execution(Engine(RANGE))
    for shape in ((5, 4), (1, 9), (1, 1), (1, 4, 1)):
        with pytest.raises(UserError, match=r"built for .*\(1, 2\) to \(4, 8\).*got") as error:
            run.run({"x": x(*shape)})
        assert "--resolutions" in error.value.fix


def held() -> list[int]:
    """The bytes of each memory for activations that there is."""
    return [array.size for array in (one() for one in MADE) if array is not None and array.dtype == np.uint8]


def engines_of(*sizes: int) -> list[Engine]:
    """An engine for each number of bytes of activations."""
    engines = [Engine(RANGE) for _ in sizes]
    for engine, size in zip(engines, sizes, strict=True):
        engine.device_memory_size_v2 = size
    return engines


def test_engines_share_the_memory_of_their_activations() -> None:
    small, large = engines = engines_of(1000, 5000)
    runs = [execution(engine) for engine in engines]
    for run in (*runs, *runs):
        run.run({"x": x(1, 4)})
    assert small.context.memory[-1] == large.context.memory[-1]
    assert [size for _, size in small.context.memory] == [1000, 5000]


def test_memory_that_is_too_small_is_freed_before_there_is_more() -> None:
    """An engine that waits does not hold it either: the plan counts the largest one alone."""
    runs = [execution(engine) for engine in engines_of(1000, 5000)]
    runs[0].run({"x": x(1, 4)})
    assert held() == [1000]
    FREED.clear()
    runs[1].run({"x": x(1, 4)})
    assert held() == [5000]
    assert FREED == [None]


def test_activations_are_freed_with_the_engine_that_needs_so_much() -> None:
    resident, on_demand = (execution(engine) for engine in engines_of(1000, 5000))
    for run in (resident, on_demand):
        run.run({"x": x(1, 4)})
    on_demand.close()
    assert held() == []
    resident.run({"x": x(1, 4)})
    assert held() == [1000]


def test_an_engine_that_is_loaded_has_the_room_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless one computes meanwhile, as the segment before it does."""
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    run = execution(*engines_of(1000))
    run.run({"x": x(1, 4)})
    with tensorrt_runtime._lock:
        tensorrt_runtime.make_room()
        assert held() == [1000]
    tensorrt_runtime.make_room()
    assert held() == []
    np.testing.assert_array_equal(run.run({"x": x(1, 4)})["y"], 2 * x(1, 4))
    tensorrt_runtime.make_room()
    monkeypatch.setitem(sys.modules, "cupy", None)  # is not needed where there is nothing to free
    tensorrt_runtime.make_room()


@pytest.mark.parametrize(
    ("budget", "kept", "activations"), [(None, 400, 1000), (0, 0, 1200), (100, 100, 1200), (10**9, 400, 1000)]
)
def test_weights_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int | None, kept: int, activations: int
) -> None:
    """The room for it is part of the activations', which all engines share. Without a budget, everything stays."""
    engine = Streaming(RANGE)
    run = load(engine, tmp_path, monkeypatch, budget)
    assert engine.budget == kept
    np.testing.assert_array_equal(run.run({"x": x(1, 4)})["y"], 2 * x(1, 4))
    assert held() == [activations]
    run.close()


@pytest.mark.parametrize("compiler", [tensorrt, tensorrt_rtx])
def test_compilers_load_frugally(compiler: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without CUDA graphs; and another GPU's or version's plan is refused before anything is loaded."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(compiler, "version", lambda: "11.4")
    monkeypatch.setattr(tensorrt_runtime, "why_not_here", lambda targets: "")
    monkeypatch.setattr(tensorrt_runtime, "load_plan", lambda *args, graphs: calls.append((*args, graphs)))
    files = [Path("dit-2.plan")]
    for budget in (None, 0):
        compiler.load_frugally(files, "sm_89", "11.4", budget)
    assert calls == [(trt, *files, compiler.NAME, "sm_89", budget, False) for budget in (None, 0)]
    with pytest.raises(UserError, match=r"was compiled by .* 10.1, and 11.4 is installed"):
        compiler.COMPILER.load_frugally(files, "sm_89", "10.1", 0)


def test_engines_that_do_not_stream_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, other, full, large = Engine(RANGE), Streaming(RANGE), Streaming(RANGE), Streaming(RANGE)
    other.streamable_weights_size = 0
    full.most = -1
    large.weight_streaming_scratch_memory_size = 1001  # more than two engines take
    monkeypatch.setattr(older, "streamable_weights_size", 0, raising=False)
    for engine, problem in (
        (older, "was not compiled to stream"),
        (other, "was not compiled to stream"),
        (full, "does not stream its weights with 100 bytes of them on the GPU"),
        (large, "needs 1001 bytes on the GPU to stream its weights, and 1000 are planned"),
    ):
        with pytest.raises(UserError, match=rf"dit-2\.plan {problem}") as error:
            load(engine, tmp_path, monkeypatch, 100)
        assert "ditforge build" in error.value.fix
    with pytest.raises(UserError, match="was not compiled to stream"):  # by a TensorRT older than 10.1
        tensorrt_runtime.stream(SimpleNamespace(), 0, tmp_path / "dit-2.plan")


@pytest.mark.parametrize("call", ["set_input_shape", "execute_async_v3"])
def test_every_failure_is_an_error(call: str) -> None:
    engine = Engine(RANGE)
    engine.context.fails = call
    with pytest.raises(DitforgeError, match=f"{call}.*what the runtime said"):
        execution(engine).run({"x": x(1, 4)})


def test_no_context() -> None:
    engine = Engine(RANGE)
    engine.create_execution_context = lambda config: None  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(DitforgeError, match="create_execution_context: what the runtime said"):
        execution(engine)


def test_kernels_are_kept_after_the_warm_up(tmp_path: Path) -> None:
    cache = tmp_path / "dit.runtime-cache"
    engine = Engine(RANGE, ((1, 16), (1, 16), (4, 16)))
    run = execution(engine, cache)
    run.warm_up()
    assert engine.context.calls == ["profile 0, (1, 4)", "profile 1, (1, 16)"]
    assert cache.read_bytes() == b"kernels"
    assert [path.name for path in tmp_path.iterdir()] == [cache.name]
    again = Engine(RANGE)
    execution(again, cache)
    assert again.config.cache.read == [b"kernels"]


def test_kernels_are_not_kept_beside_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model repository can be read-only. Plans of one name, in two repositories, do not share a file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, other = (tensorrt_runtime.kernels_of(tmp_path / repo / "dit.plan") for repo in ("one", "other"))
    assert one.is_relative_to(tmp_path / "cache" / "ditforge") and one != other
    assert one == tensorrt_runtime.kernels_of(tmp_path / "other" / ".." / "one" / "dit.plan")
    run = execution(Engine(RANGE), one)
    run.warm_up()
    assert one.read_bytes() == b"kernels"


def test_kernels_compiled_since_are_kept_when_it_is_closed(tmp_path: Path) -> None:
    cache = tmp_path / "dit.runtime-cache"
    engine = Engine(RANGE)
    run = execution(engine, cache)
    run.warm_up()
    before = cache.stat().st_mtime_ns
    run.keep_kernels()
    assert cache.stat().st_mtime_ns == before  # there is nothing new
    engine.config.cache.kernels = b"kernels of other shapes"
    run.close()
    assert cache.read_bytes() == b"kernels of other shapes"


def test_a_closed_engine_holds_nothing() -> None:
    engine = Engine(((1, 4), (1, 4), (1, 4)))
    run = execution(engine)
    result = run.run_batch([{"x": x(1, 4)}])
    alive = [weakref.ref(thing) for thing in (engine, engine.context)]
    run.close()
    del engine
    assert [thing() for thing in alive] == [None, None]
    assert FREED[-1] is None  # it was dropped before
    assert tensorrt_runtime._scratch is None and not run.kept
    np.testing.assert_array_equal(result["y"], 2 * x(1, 4))


def test_the_shared_scratch_stays_as_long_as_an_engine_does() -> None:
    resident, on_demand = (execution(Engine(((1, 4), (1, 4), (1, 4)))) for _ in range(2))
    for run in (resident, on_demand):
        run.run_batch([{"x": x(1, 4)}])
    scratch = tensorrt_runtime._scratch
    on_demand.close()
    assert scratch is not None and tensorrt_runtime._scratch is scratch
    resident.close()
    assert tensorrt_runtime._scratch is None


def test_bf16_is_stored_in_two_bytes() -> None:
    engine = Engine(RANGE)
    engine.get_tensor_dtype = lambda name: trt.bfloat16 if name == "x" else trt.float32  # type: ignore[method-assign,return-value]
    run = execution(engine)
    assert run.dtypes == {"x": np.dtype(np.uint16), "y": np.dtype(np.float32)}


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    run = execution(Engine(RANGE), tmp_path / "file" / "dit.runtime-cache")
    with pytest.warns(DitforgeWarning, match="the next start compiles again"):
        run.warm_up()
