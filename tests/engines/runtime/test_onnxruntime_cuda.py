"""The calls of a session on a GPU: ONNX Runtime's own session and bindings, but on the CPU, and a stand-in for CuPy."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from small_graphs import parsed

from ditforge.engines.runtime import onnxruntime_cuda
from ditforge.engines.runtime.onnxruntime_cuda import CudaSession, Settings
from ditforge.errors import DitforgeError

GRAPH = """
g (float[B, N] x, float16[B] t) => (float[B, N] y, float16[B] u) <float[1] two = {2.0}> {
    y = Mul(x, two)
    u = Identity(t)
}
"""


class Array(np.ndarray):
    """NumPy's array with what is used of CuPy's; `data.ptr` is its address."""

    def __new__(cls, shape: tuple[int, ...], dtype: Any, pointer: Any) -> Array:
        memory = pointer.memory
        buffer = (ctypes.c_char * memory.size).from_address(memory.address)
        made = np.frombuffer(buffer, dtype).reshape(shape).view(cls)
        made.owner = memory.owner
        return made

    def __array_finalize__(self, base: Any) -> None:
        self.owner = getattr(base, "owner", None)

    def set(self, value: np.ndarray, stream: object = None) -> None:
        self[...] = value

    def get(self) -> np.ndarray:
        return np.array(self)


Array.data = property(  # type: ignore[assignment,method-assign]
    lambda array: SimpleNamespace(ptr=array.__array_interface__["data"][0])
)


class Stream:
    def __init__(self, non_blocking: bool) -> None:
        assert non_blocking

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def synchronize(self) -> None: ...


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    return np.full(shape, 77, dtype).view(Array)


CUPY = SimpleNamespace(
    ndarray=Array,
    empty=empty,
    empty_like=lambda array: empty(array.shape, array.dtype),
    get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: None),
    cuda=SimpleNamespace(
        Stream=Stream,
        UnownedMemory=lambda address, size, owner: SimpleNamespace(address=address, size=size, owner=owner),
        MemoryPointer=lambda memory, offset: SimpleNamespace(memory=memory),
    ),
)


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(onnxruntime_cuda, "DEVICE", "cpu")
    graph = parsed(GRAPH, tmp_path)

    def make(settings: Settings | None = None) -> CudaSession:
        return CudaSession(
            ort.InferenceSession(graph, providers=["CPUExecutionProvider"]), CUPY, settings or Settings()
        )

    return make


def on_gpu(*shape: int, dtype: str = "f4") -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype).view(Array)


def test_requests_become_one_batch(session: Any) -> None:
    engine = session()
    assert (engine.inputs, engine.outputs) == (["x", "t"], ["y", "u"])
    parts = [{"x": on_gpu(2, 3), "t": on_gpu(2, dtype="f2")}, {"x": np.ones((1, 3), "f4"), "t": np.ones(1, "f2")}]
    outputs = engine.run_batch(parts)
    np.testing.assert_array_equal(outputs["y"], 2 * np.concatenate([part["x"] for part in parts]))
    np.testing.assert_array_equal(outputs["u"], np.concatenate([part["t"] for part in parts]))
    assert outputs["y"].dtype == np.float32 and outputs["u"].dtype == np.float16


def test_one_request_on_the_gpu_is_not_copied(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, given = session(), {"x": on_gpu(2, 3), "t": on_gpu(2, dtype="f2")}
    bound: list[dict[str, Any]] = []
    bind = engine.bind
    monkeypatch.setattr(engine, "bind", lambda inputs: bound.append(inputs) or bind(inputs))
    engine.run_batch([given])
    assert bound[0]["x"] is given["x"]
    transposed = on_gpu(3, 2).T  # ONNX Runtime takes an address, and knows no strides
    np.testing.assert_array_equal(engine.run_batch([given | {"x": transposed}])["y"], 2 * transposed)


def test_outputs_outlive_the_engine(session: Any) -> None:
    engine, given = session(), {"x": on_gpu(2, 3), "t": on_gpu(2, dtype="f2")}
    outputs = engine.run_batch([given])
    engine.close()
    del engine
    np.testing.assert_array_equal(outputs["y"], 2 * given["x"])


def test_graphs_are_kept_for_the_first_shapes(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = session(Settings(graphs=2))
    ran: list[str] = []
    run = engine.session.run_with_iobinding

    def note(binding: Any, options: Any) -> None:
        ran.append(options.get_run_config_entry("gpu_graph_id"))
        run(binding, options)

    monkeypatch.setattr(engine.session, "run_with_iobinding", note)
    kept = []
    for width in (3, 4, 5, 3):
        given = {"x": on_gpu(2, width), "t": on_gpu(2, dtype="f2")}
        kept.append((given["x"].copy(), engine.run_batch([given])["y"]))
    # A first run shows what the outputs are; ONNX Runtime then needs some runs to capture; the one after is the answer.
    assert ran == ["-1", *["0"] * 4, "-1", *["1"] * 4, "-1", "0"]
    for x, y in kept:  # the graph's own memory is used again, and answers are copies
        np.testing.assert_array_equal(y, 2 * x)


def test_run_gives_numpy(session: Any) -> None:
    outputs = session().run({"x": np.ones((1, 2), "f4"), "t": np.zeros(1, "f2")})
    assert all(type(array) is np.ndarray for array in outputs.values())


def test_out_of_memory_is_said(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = session()

    def fail(*_: object) -> None:
        raise RuntimeError("BFCArena::AllocateRawInternal Available memory of 5 is smaller than requested bytes of 9")

    monkeypatch.setattr(engine.session, "run_with_iobinding", fail)
    with pytest.raises(DitforgeError, match="the GPU is out of memory") as error:
        engine.run_batch([{"x": on_gpu(1, 2), "t": on_gpu(1, dtype="f2")}])
    assert "--gpu-memory" in error.value.fix


def test_options_of_the_provider() -> None:
    assert Settings().provider()["use_tf32"] == "0" and "gpu_mem_limit" not in Settings().provider()
    chosen = Settings(graphs=1, memory_limit=5, attention=1).provider()
    assert {"enable_cuda_graph": "1", "gpu_mem_limit": "5", "sdpa_kernel": "1"}.items() <= chosen.items()
