"""Norms take the bias before them, and the scale and shift after them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graphs import computed, parsed, passed, relative

HEADS = """
g (float[B, S, 6] x) => (float[B, S, 4, 8] y) <int64[4] split = {-1, 5, 4, 8}> {
    p = MatMul(x, w)
    a = Add(SUM)
    h = Reshape <allowzero = 1> (a, split)
    y = RMSNormalization <axis = -1, epsilon = 1e-6> (h, gamma)
}
"""
MODULATED = """
g (float[B, S, 8] x, float[B, 1, 8] scale, float[B, MIDDLE, 8] shift) => (float[B, S, 8] y)
<float[1] one = {1.0}> {
    n = LayerNormalization <axis = -1, epsilon = 1e-6> (x, gamma)
    s = Add(scale, one)
    m = Mul(n, s)
    y = Add(m, shift)
}
"""


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"w": (6, 32), "bias": (32,), "gamma": (8,)}
    return {name: rng.standard_normal(size).astype("f4") for name, size in sizes.items()}


@pytest.mark.parametrize("order", ["p, bias", "bias, p"])
def test_a_bias_in_an_rms_norm(tmp_path: Path, order: str) -> None:
    graph = parsed(HEADS.replace("SUM", order), tmp_path, **weights())
    path, counts, before, after = passed(graph, "norm with bias")
    assert counts == {"norm with bias": 1}
    assert (before["Add"], before["RMSNormalization"]) == (1, 1)
    assert (after["Add"], after["RMSNormalization"], after["SkipSimplifiedLayerNormalization"]) == (0, 0, 1)
    x = {"x": np.random.default_rng(1).standard_normal((3, 5, 6)).astype("f4")}
    assert relative(computed(path, x)[0], computed(graph, x)[0]) < 1e-6


def test_a_sum_that_is_not_a_bias_stays(tmp_path: Path) -> None:
    graph = parsed(HEADS.replace("SUM", "p, p"), tmp_path, **weights())
    assert passed(graph, "norm with bias")[1] == {"norm with bias": 0}


def test_a_scale_and_a_shift_for_each_sample(tmp_path: Path) -> None:
    graph = parsed(MODULATED.replace("MIDDLE", "1"), tmp_path, gamma=np.ones(8, "f4"))
    path, counts, _, after = passed(graph, "modulated norm")
    assert counts == {"modulated norm": 1} and (after["Mul"], after["Add"], after["LayerNormalization"]) == (0, 1, 1)
    rng = np.random.default_rng(0)
    sizes = {"x": (3, 5, 8), "scale": (3, 1, 8), "shift": (3, 1, 8)}  # a batch: each sample has its own
    inputs = {name: rng.standard_normal(size).astype("f4") for name, size in sizes.items()}
    assert relative(computed(path, inputs)[0], computed(graph, inputs)[0]) < 1e-6


@pytest.mark.parametrize(("middle", "gamma"), [("S", 1), ("1", 2)])
def test_other_sums_stay(tmp_path: Path, middle: str, gamma: float) -> None:
    """A shift for each token, and a norm with weights of its own."""
    graph = parsed(MODULATED.replace("MIDDLE", middle), tmp_path, gamma=np.full(8, gamma, "f4"))
    assert passed(graph, "modulated norm")[1] == {"modulated norm": 0}
