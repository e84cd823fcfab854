"""Products of concatenations, with their bias; GELU; and 8-bit weights beside bf16."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from small_graphs import computed, evaluated, parsed, passed, relative

SPLIT = """
g (float[B, S, 6] x, float[B, S, 10] z) => (float[B, S, 8] y) {
    j = Concat <axis = -1> (x, z)
    WEIGHT
    p = MatMul(j, d)
    y = Add(p, bias)
}
"""
GELU = """
g (float[B, S, 6] x) => (float[B, S, 8] y, float[B, S, 8] silu, float[B, S, 8] quick) <float[1] alpha = {1.702}> {
    p = MatMul(x, w)
    a = Add(p, bias)
    y = Gelu <approximate = "KIND"> (a)
    q = Tanh(y)
    r = Sigmoid(q)
    silu = Mul(q, r)
    t = Tanh(silu)
    u = Mul(t, alpha)
    v = Sigmoid(u)
    quick = Mul(v, t)
}
"""
EIGHT = """
g (bfloat16[B, S, 6] x) => (bfloat16[B, S, 8] y) {
    d = DequantizeLinear <axis = 1> (w, scale)
    y = MatMul(x, d)
}
"""


def random(*size: int) -> np.ndarray:
    return np.random.default_rng(sum(size)).standard_normal(size).astype("f4")


def test_a_concatenation_becomes_a_sum(tmp_path: Path) -> None:
    w = random(16, 8)
    graph = parsed(SPLIT.replace("WEIGHT", "d = Identity(w)"), tmp_path, w=w, bias=random(8))
    assert passed(graph, "split product")[1] == {"split product": 0}  # the weight is computed
    graph = parsed(SPLIT.replace("WEIGHT", "").replace("(j, d)", "(j, w)"), tmp_path, w=w, bias=random(8))
    path, counts, before, after = passed(graph, "split product")
    assert counts == {"split product": 1}
    assert (before["Concat"], before["MatMul"]) == (1, 1) and (after["Concat"], after["MatMul"]) == (0, 2)
    inputs = {"x": random(2, 5, 6), "z": random(2, 5, 10)}
    assert relative(computed(path, inputs)[0], computed(graph, inputs)[0]) < 1e-6
    three, counts, _, after = passed(graph, "split product", "three terms")
    assert counts["three terms"] == 1 and (after["Add"], after["BiasAdd"]) == (0, 1)
    assert relative(evaluated(three, inputs)[0], computed(graph, inputs)[0]) < 1e-6


def test_rows_of_a_weight_are_parts_of_its_file(tmp_path: Path) -> None:
    from ditforge.engines.compilers import onnx_passes

    w = random(16, 8)
    graph = parsed(SPLIT.replace("WEIGHT", "").replace("(j, d)", "(j, w)"), tmp_path, w=w, bias=random(8))
    model = onnx_passes.load(graph)
    onnx_passes.apply(model, ["split product"])
    rows = [value.const_value for name, value in model.graph.initializers.items() if "_rows_" in name]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in rows) and len(rows) == 2
    np.testing.assert_array_equal(np.concatenate([tensor.numpy() for tensor in rows]), w)  # type: ignore[union-attr]


def test_a_quantised_weight_is_split_too(tmp_path: Path) -> None:
    numbers, scale = (random(16, 8) * 40).astype(np.int8), np.abs(random(8)) / 40
    text = SPLIT.replace("WEIGHT", "d = DequantizeLinear <axis = 1> (w, scale)")
    graph = parsed(text, tmp_path, w=numbers, scale=scale, bias=random(8))
    path, counts, _, after = passed(graph, "split product")
    assert counts == {"split product": 1} and after["DequantizeLinear"] == 2
    inputs = {"x": random(2, 5, 6), "z": random(2, 5, 10)}
    assert relative(computed(path, inputs)[0], computed(graph, inputs)[0]) < 1e-6


@pytest.mark.parametrize(("kind", "operator"), [("tanh", "FastGelu"), ("none", "BiasGelu")])
def test_gelu_takes_the_bias(tmp_path: Path, kind: str, operator: str) -> None:
    graph = parsed(GELU.replace("KIND", kind), tmp_path, w=random(6, 8), bias=random(8))
    path, counts, before, after = passed(graph, "gelu with bias", "gelu with sigmoid")
    assert counts == {"gelu with bias": 1, "gelu with sigmoid": 2}
    assert (after["Gelu"], after[operator], after["QuickGelu"], after["Sigmoid"]) == (0, 1, 2, 0)
    assert (before["Gelu"], before["Sigmoid"]) == (1, 2)
    inputs = {"x": random(2, 5, 6)}
    for actual, expected in zip(computed(path, inputs), computed(graph, inputs), strict=True):
        assert relative(actual, expected) < 1e-6  # tanh's and erf's GELU differ by more: 2e-4


@pytest.mark.parametrize(
    ("dtype", "operator"), [(ml_dtypes.float8_e4m3fn, "MatMulBlockQuantizedFp8Weight"), (np.int8, "Mul")]
)
def test_8_bit_weights_beside_bf16(tmp_path: Path, dtype: type, operator: str) -> None:
    numbers, scale = (random(6, 8) * 40).astype(dtype), (np.abs(random(8)) / 40).astype(ml_dtypes.bfloat16)
    graph = parsed(EIGHT, tmp_path, w=numbers, scale=scale)
    path, counts, before, after = passed(graph, "8-bit beside bf16")
    assert counts == {"8-bit beside bf16": 1}
    assert (before["DequantizeLinear"], after["DequantizeLinear"], after[operator]) == (1, 0, 1)
    x = random(2, 5, 6).astype(ml_dtypes.bfloat16)
    exact = x.astype("f8") @ (numbers.astype("f8") * scale.astype("f8"))
    assert relative(evaluated(path, {"x": x})[0], exact) < 4e-3  # bf16 has 8 bits


def test_resize_of_bf16(tmp_path: Path) -> None:
    text = """
    g (bfloat16[B, 3, H, W] x) => (bfloat16[B, 3, H2, W2] y) <float[4] twice = {1.0, 1.0, 2.0, 2.0}> {
        y = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
            (x, , twice)
    }
    """
    path, counts, _, after = passed(parsed(text, tmp_path), "resize in fp32")
    assert counts == {"resize in fp32": 1} and after["Cast"] == 2
    x = random(1, 3, 2, 4).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(evaluated(path, {"x": x})[0], x.repeat(2, 2).repeat(2, 3))
