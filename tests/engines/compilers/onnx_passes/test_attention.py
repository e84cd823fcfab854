"""Attention becomes MultiHeadAttention where it computes the same, and only there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graphs import computed, parsed, passed, relative

GRAPH = """
g (float[B, S, 4, 8] q, float[B, T, KV, 8] k, float[B, T, KV, 8] v, MASK mask) => (float[B, S, 32] y)
<int64[3] flat = {0, -1, 32}> {
    q2 = Transpose <perm = [0, 2, 1, 3]> (q)
    k2 = Transpose <perm = [0, 2, 1, 3]> (k)
    v2 = Transpose <perm = [0, 2, 1, 3]> (v)
    a = Attention <ATTRIBUTES> (q2, k2, v2 GIVEN)
    b = Transpose <perm = [0, 2, 1, 3]> (a)
    y = Reshape <allowzero = 0> (b, flat)
}
"""
NO_MASK = {"MASK": "float[1]", "GIVEN": ""}


def made(folder: Path, attributes: str = "is_causal = 0", **words: str) -> Path:
    text = GRAPH.replace("ATTRIBUTES", attributes)
    for word, instead in ({"KV": "4"} | words).items():
        text = text.replace(word, instead)
    return parsed(text, folder)


def given(heads: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    sizes = {"q": (2, 5, 4, 8), "k": (2, 7, heads, 8), "v": (2, 7, heads, 8)}
    return {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()} | {"mask": np.zeros(1, "f4")}


@pytest.mark.parametrize("attributes", ["is_causal = 0", "scale = 0.7", "softcap = 0.0"])
def test_between_transposes(tmp_path: Path, attributes: str) -> None:
    graph = made(tmp_path, attributes, **NO_MASK)
    # A Reshape that keeps its input's first dimension would keep another one of another input.
    assert passed(graph, "multi-head attention")[1] == {"multi-head attention": 0}
    text = GRAPH.replace("{0, -1, 32}", "{-1, 5, 32}").replace("ATTRIBUTES", attributes).replace("KV", "4")
    for word, instead in NO_MASK.items():
        text = text.replace(word, instead)
    graph = parsed(text, tmp_path)
    path, counts, before, after = passed(graph, "multi-head attention")
    assert counts == {"multi-head attention": 1}
    assert (before["Transpose"], before["Attention"]) == (4, 1)
    assert (after["Transpose"], after["Attention"], after["MultiHeadAttention"]) == (0, 0, 1)
    # The sums are in another order.
    assert relative(computed(path, given())[0], computed(graph, given())[0]) < 1e-5


def test_an_additive_mask(tmp_path: Path) -> None:
    graph = made(tmp_path, **{"MASK": "float[B, 1, S, T]", "GIVEN": ", mask", "{0, -1, 32}": "{-1, 5, 32}"})
    path, counts, _, _ = passed(graph, "multi-head attention")
    assert counts == {"multi-head attention": 1}
    inputs = given() | {"mask": np.where(np.arange(7) < 4, 0, -1e4).astype("f4") * np.ones((2, 1, 5, 1), "f4")}
    assert relative(computed(path, inputs)[0], computed(graph, inputs)[0]) < 1e-5


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ("softcap = 20.0", NO_MASK),
        ("is_causal = 0", NO_MASK | {"KV": "2"}),
        ("is_causal = 0", {"MASK": "bool[B, 1, S, T]", "GIVEN": ", mask"}),
    ],
)
def test_what_is_left_alone(tmp_path: Path, attributes: str, words: dict[str, str]) -> None:
    graph = made(tmp_path, attributes, **words | {"{0, -1, 32}": "{-1, 5, 32}"})
    _, counts, before, after = passed(graph, "multi-head attention")
    assert counts == {"multi-head attention": 0} and after == before


BLOCK = """
g (float[B, S, 6] x, float[B, S, 10] z) => (float[B, S, 8] y)
<int64[4] split = {-1, 5, 4, 8}, int64[3] flat = {-1, 5, 32}> {
    q = MatMul(x, w)
    v = MatMul(x, u)
    v1 = Add(v, inner)
    q1 = Reshape(q, split)
    v2 = Reshape(v1, split)
    q2 = Transpose <perm = [0, 2, 1, 3]> (q1)
    v3 = Transpose <perm = [0, 2, 1, 3]> (v2)
    a = Attention(q2, q2, v3)
    b = Transpose <perm = [0, 2, 1, 3]> (a)
    c = Reshape(b, flat)
    j = Concat <axis = 2> (c, z)
    p = MatMul(j, o)
    y = Add(p, outer)
}
"""


def block(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    sizes = {"w": (6, 32), "u": (6, 32), "inner": (32,), "o": (42, 8), "outer": (8,)}
    weights = {name: rng.standard_normal(size).astype("f4") for name, size in sizes.items()}
    inputs = {"x": rng.standard_normal((2, 5, 6)).astype("f4"), "z": rng.standard_normal((2, 5, 10)).astype("f4")}
    return parsed(BLOCK, folder, **weights), inputs


@pytest.mark.parametrize("three", [(), ("three terms",)])
def test_the_bias_of_values_comes_later(tmp_path: Path, three: tuple[str, ...]) -> None:
    graph, inputs = block(tmp_path)
    path, counts, before, after = passed(graph, "multi-head attention", "split product", *three, "bias of values")
    assert counts["bias of values"] == 1
    assert (before["Add"], after["Add"], after["BiasAdd"]) == ((2, 0, 1) if three else (2, 2, 0))
    if not three:  # ONNX Runtime has no BiasAdd for the CPU
        assert relative(computed(path, inputs)[0], computed(graph, inputs)[0]) < 1e-5


def test_heads_are_not_made_where_they_are_merged_again(tmp_path: Path) -> None:
    graph, inputs = block(tmp_path)
    path, counts, _, after = passed(graph, "multi-head attention", "merged heads")
    assert counts["merged heads"] == 3 and after["Reshape"] == 4  # query, which is the key too, value, and the result
    assert relative(computed(path, inputs)[0], computed(graph, inputs)[0]) < 1e-5
