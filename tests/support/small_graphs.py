"""Small graphs in ONNX's text form, what passes make of them, and what both compute in ONNX Runtime on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ditforge.engines.compilers import onnx_passes
from ditforge.engines.compilers.onnxruntime import session_options

Arrays = dict[str, Any]
HEADER = '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>\n'


class BiasAdd(OpRun):
    """X + bias + skip: ONNX Runtime has no kernel for it on the CPU."""

    op_domain = "com.microsoft"

    def _run(self, x: Any, bias: Any, skip: Any) -> tuple[Any]:
        return ((x + bias + skip).astype(x.dtype),)


class MatMulBlockQuantizedFp8Weight(OpRun):
    """A [..., K] times the transpose of B [N, K], whose rows are multiplied by b_scale [N, 1] and rounded as A is."""

    op_domain = "com.microsoft"

    def _run(self, a: Any, b: Any, b_scale: Any, block_size: int | None = None) -> tuple[Any]:
        assert block_size == b.shape[1] and b_scale.shape == (len(b), 1) and b_scale.dtype == np.float32
        weight = (b.astype(np.float32) * b_scale).astype(a.dtype)
        return ((a.astype(np.float32) @ weight.astype(np.float32).T).astype(a.dtype),)


def parsed(text: str, folder: Path, **initializers: Any) -> Path:
    """A graph of ONNX's text form, without its header, in a file whose initializers are beside it."""
    model = onnx.parser.parse_model(HEADER + text)
    for name, array in initializers.items():
        model.graph.initializer.append(ir.to_proto(ir.tensor(array, name=name)))
    onnx.checker.check_model(model)
    path = folder / "graph.onnx"
    onnx.save(model, path, save_as_external_data=True, location="graph.onnx.data", size_threshold=64)
    return path


def passed(graph: Path, *names: str) -> tuple[Path, dict[str, int], Counter[str], Counter[str]]:
    """The graph after passes: its file, what each found, and the operators before and after."""
    model = onnx_passes.load(graph)
    before = Counter(node.op_type for node in model.graph)
    counts = onnx_passes.apply(model, names or tuple(onnx_passes.PASSES))
    after = Counter(node.op_type for node in model.graph)
    path = graph.with_name(f"passed-{graph.name}")
    ir.save(model, path, external_data=f"{path.name}.data")
    return path, counts, before, after


def computed(graph: Path, inputs: Arrays) -> list[Any]:
    """What a graph computes, with no optimiser of ONNX Runtime's own."""
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    return session.run(None, {name: array for name, array in inputs.items() if name in wanted})  # type: ignore[no-any-return]


def evaluated(graph: Path, inputs: Arrays) -> list[Any]:
    """What a graph computes in ONNX's reference evaluator, which has every number format."""
    evaluator = ReferenceEvaluator(str(graph), new_ops=[BiasAdd, MatMulBlockQuantizedFp8Weight])
    return evaluator.run(None, inputs)  # type: ignore[no-any-return]


def relative(actual: Any, expected: Any) -> float:
    """The relative error in the norm of all numbers."""
    a, b = np.asarray(actual).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
