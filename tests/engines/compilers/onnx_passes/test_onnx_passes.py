"""ONNX Runtime's engines for GPUs: what is written without one, and what is said where they cannot run."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exports import alone

from ditforge import manifest
from ditforge.engines.build import BuildOptions, build
from ditforge.engines.compilers import Job, onnxruntime
from ditforge.engines.compilers.choice import check_component
from ditforge.engines.gpus import find_target
from ditforge.engines.runtime import cuda_provider, onnxruntime_cuda
from ditforge.engines.verify import as_declared, compared_sizes, example
from ditforge.errors import DitforgeWarning, UserError
from ditforge.manifest import Component

H100 = find_target("h100")
COUNTED = ("Transpose", "Cast", "Attention", "MultiHeadAttention", "RMSNormalization", "RotaryEmbedding", "Gelu")


def compiled(export: Path, name: str, out: Path) -> tuple[Path, Counter[str], Counter[str]]:
    """The engine of a network for an H100, and the operators of the export and of the engine."""
    component, graph = manifest.read(export, "onnx").components[name], export / f"{name}.onnx"
    files = onnxruntime.compile(Job(name, component, graph, out / name, H100, [], lambda *step: None))
    assert [file.name for file in files] == [f"{name}.onnx", f"{name}.onnx.data"]
    before, after = (Counter(node.op_type for node in ir.load(path).graph) for path in (graph, files[0]))
    return files[0], before, after


def on_cpu(graph: Path, export: Path, name: str) -> list[np.ndarray]:
    """What a graph computes on the CPU."""
    found = manifest.read(export, "onnx")
    component, sizes = found.components[name], compared_sizes(found.model, name, 2)
    inputs = {key: example(key, tensor, sizes, found.model) for key, tensor in component.inputs.items()}
    session = ort.InferenceSession(graph, onnxruntime.session_options(), providers=["CPUExecutionProvider"])
    return session.run(None, as_declared(inputs, component))  # type: ignore[no-any-return]


def test_flux_is_rewritten(tiny, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, before, after = compiled(tiny.onnx, "dit", tmp_path)
    assert [before[name] for name in COUNTED] == [30, 2, 7, 0, 18, 14, 9]
    assert [after[name] for name in COUNTED] == [2, 2, 0, 7, 0, 14, 0]
    assert (after["BiasAdd"], after["FastGelu"]) == (5, 9)
    assert after["SkipSimplifiedLayerNormalization"] == 18


@pytest.mark.parametrize("name", ["dit", "clip_g", "vae_decoder", "vae_encoder"])
def test_stable_diffusion_computes_the_same(sd3, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    engine, _, after = compiled(sd3.onnx, name, tmp_path)
    assert sum(after[operator] for operator in ("MultiHeadAttention", "BiasGelu", "QuickGelu")) > 0
    if name == "clip_g":
        return  # its input is token ids, which another test encodes
    for actual, expected in zip(
        on_cpu(engine, sd3.onnx, name), on_cpu(sd3.onnx / f"{name}.onnx", sd3.onnx, name), strict=True
    ):
        difference = actual.astype(np.float64) - expected.astype(np.float64)
        # fp32 in another order; of the decoder's 8-bit pixels, some are rounded to the neighbour.
        assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(expected.astype(np.float64))


@pytest.mark.parametrize(
    ("precision", "base", "expected"),
    [
        ("bf16", "bf16", {"MatMulBlockQuantizedFp8Weight": 0, "DequantizeLinear": 0}),
        ("fp8-weights", "bf16", {"DequantizeLinear": 0}),
        ("int8-weights", "bf16", {"DequantizeLinear": 0, "MatMulBlockQuantizedFp8Weight": 0}),
        ("fp8-weights", "fp16", {"MatMulBlockQuantizedFp8Weight": 0}),
    ],
)
def test_16_and_8_bits(dits, tmp_path: Path, precision: str, base: str, expected: dict[str, int]) -> None:  # type: ignore[no-untyped-def]
    export = dits(precision, base)
    engine, before, after = compiled(export, "dit", tmp_path)
    for operator, count in expected.items():
        assert after[operator] == count, operator
    if precision == "bf16":
        assert before["Cast"] - after["Cast"] == 2 * before["RotaryEmbedding"] - 2  # the tables' remain
    assert before["Transpose"] > after["Transpose"] == 2 and after["Attention"] == 0
    dequantised = before["DequantizeLinear"] + after["MatMul"] - before["MatMul"]
    if (precision, base) == ("fp8-weights", "bf16"):
        assert after["MatMulBlockQuantizedFp8Weight"] > 0
    elif base == "fp16":
        assert after["DequantizeLinear"] == dequantised  # a split product's weight counts twice
    stored, given = ((path / "dit.onnx.data").stat().st_size for path in (engine.parent, export))
    assert stored < 1.1 * given + 10_000  # 8-bit weights are not widened


def test_a_build_without_tensorrt_says_what_it_takes(exports, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    export = alone(exports("fp16", "fp16"), tmp_path / "onnx")
    with pytest.warns(DitforgeWarning, match="onnxruntime compiles for h100: tensorrt: TensorRT is not installed"):
        built = build(export, tmp_path / "out", BuildOptions("h100"))
    assert {(engine.compiler, engine.target) for engine in built.manifest.engines.values()} == {
        ("onnxruntime", "sm_90")
    }


def test_fp8_activations_beside_bf16_are_refused() -> None:
    component = Component(files={}, precision="fp8", dtype="bf16", reason="", inputs={}, outputs={})
    with pytest.raises(UserError, match="fp8 with bf16 around it") as error:
        check_component(onnxruntime.COMPILER, "dit", component, H100)
    assert "fp16" in error.value.fix
    check_component(onnxruntime.COMPILER, "dit", component.model_copy(update={"dtype": "fp16"}), H100)


def test_there_is_no_gpu_here(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="they are for sm_90, and this machine has no NVIDIA GPU"):
        onnxruntime.load([tmp_path / "dit.onnx"], "sm_90", "")


def test_the_provider_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_provider, "why_not_here", lambda targets: "")
    with pytest.raises(UserError, match="is the one for CPUs: it has no CUDA provider") as error:
        onnxruntime.load([tmp_path / "dit.onnx"], "sm_90", "")
    assert "uninstall onnxruntime" in error.value.fix and "onnxruntime-gpu" in error.value.fix


def test_the_provider_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would go on with the CPU."""
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    with pytest.raises(UserError, match="cannot use its CUDA provider"):
        onnxruntime_cuda.load_session(tmp_path / "dit.onnx", onnxruntime.session_options())


def test_cupy_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match="cupy, which is not installed"):
        onnxruntime_cuda.load_session(tmp_path / "dit.onnx", onnxruntime.session_options())


def test_memory_that_does_not_suffice() -> None:
    said = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Failed to allocate memory for requested buffer of size 99"
    assert "out of memory" in str(onnxruntime_cuda.out_of_memory(RuntimeError(said)))
    assert onnxruntime_cuda.out_of_memory(RuntimeError("Non-zero status code")) is None
