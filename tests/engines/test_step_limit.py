"""The rates that bound a step: the graphs that they are measured with, and what needs no PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from ditforge.engines.step_limit import (
    HEADS,
    PRODUCT,
    Rates,
    attention_operations,
    fastest,
    product_operations,
    write_graphs,
)
from ditforge.export.graph.measure_footprint import attention_flops


def in_fp32(path: Path) -> ort.InferenceSession:
    """The graph with all numbers in fp32, for which a CPU has kernels."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)


def test_the_graphs_compute_a_product_and_attention(tmp_path: Path) -> None:
    product, attention = write_graphs(tmp_path, (5, 7, 3), (2, 4, 6, 8))
    a, b = random(5, 7), random(7, 3)
    np.testing.assert_allclose(in_fp32(product).run(None, {"a": a, "b": b})[0], a @ b, atol=1e-5)
    streams = {name: random(2, 6, 32) + number for number, name in enumerate(("query", "key", "value"))}
    heads = [torch.from_numpy(stream).view(2, 6, 4, 8).transpose(1, 2) for stream in streams.values()]
    expected = scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 6, 32)
    np.testing.assert_allclose(in_fp32(attention).run(None, streams)[0], expected.numpy(), atol=1e-5)


def test_operations_are_those_that_are_counted_of_a_step() -> None:
    assert product_operations((2, 3, 5)) == 2 * 2 * 3 * 5
    heads = (2, 4, 6, 8)
    assert attention_operations(heads) == attention_flops((torch.empty(heads, device="meta"),) * 3)
    assert product_operations(PRODUCT) > 1e12 and attention_operations(HEADS) > 1e12  # milliseconds on any GPU


def test_the_least_time_is_that_of_the_precision() -> None:
    rates = Rates(product=2e12, attention=1e12, product_fp8=4e12)
    assert rates.least_ms("bf16", 8e12, 1e12) == rates.least_ms("int8-weights", 8e12, 1e12) == 5000
    assert rates.least_ms("fp8", 8e12, 1e12) == 3000
    assert rates.least_ms("fp32", 8e12, 1e12) is None
    assert Rates(2e12, 1e12).least_ms("fp8", 8e12, 1e12) is None


def test_the_first_calls_do_not_count() -> None:
    waits = iter([5.0, 5.0, 0.03, 0.02, 0.03, 0.03, 0.03])
    clock = [0.0]

    def run() -> None:
        clock[0] += next(waits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ditforge.engines.step_limit.time.perf_counter", lambda: clock[0])
        assert fastest(run) == pytest.approx(0.02)


def test_for_engines_of_onnxruntime_pytorch_is_never_imported(tmp_path: Path) -> None:
    """Without a GPU there is no rate, which is an error in words; PyTorch, which is installed, is not asked."""
    code = (
        "import sys\n"
        "from ditforge.engines.step_limit import measure_rates\n"
        "from ditforge.errors import UserError\n"
        "try:\n    measure_rates('onnxruntime')\n"
        "except UserError as error:\n    print('torch' in sys.modules, error.problem)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told.stdout.startswith("False ")
