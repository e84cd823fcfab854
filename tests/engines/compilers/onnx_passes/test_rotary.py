"""Rotations lose their Casts and come before the Transpose, and rotate the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_graphs import computed, parsed, passed, relative

GRAPH = """
g (float16[B, S, 4, 8] x, float16[B, S, 4, 8] z, float[B, S, 4] cos, float[B, S, 4] sin)
    => (float16[B, 4, S, 8] y, float16[B, 4, S, 8] w) {
    a = Transpose <perm = [0, 2, 1, 3]> (x)
    wide = Cast <to = 1> (a)
    turned = RotaryEmbedding <interleaved = INTERLEAVED> (wide, cos, sin)
    y = Cast <to = 10> (turned)
    a2 = Transpose <perm = [0, 2, 1, 3]> (z)
    wide2 = Cast <to = 1> (a2)
    turned2 = RotaryEmbedding <interleaved = INTERLEAVED> (wide2, cos, sin)
    w = Cast <to = 10> (turned2)
}
"""


def given() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    angle = rng.uniform(0, 6, (2, 5, 4)).astype("f4")
    numbers = {name: rng.standard_normal((2, 5, 4, 8)).astype(np.float16) for name in "xz"}
    return numbers | {"cos": np.cos(angle), "sin": np.sin(angle)}


@pytest.mark.parametrize("interleaved", [0, 1])
def test_in_16_bits(tmp_path: Path, interleaved: int) -> None:
    graph = parsed(GRAPH.replace("INTERLEAVED", str(interleaved)), tmp_path)
    path, counts, before, after = passed(graph, "narrow rotation")
    assert counts == {"narrow rotation": 2}
    assert (before["Cast"], after["Cast"]) == (4, 2)  # those of the tables, which both share
    for actual, expected in zip(computed(path, given()), computed(graph, given()), strict=True):
        assert relative(actual, expected) < 6e-4  # tables, products and sum are rounded to 11 bits each


def test_before_heads(tmp_path: Path) -> None:
    text = (
        GRAPH.replace("INTERLEAVED", "1")
        .replace("(turned)", "(t)")
        .replace("y = Cast", "t = Identity(turned)\n y = Cast")
    )
    graph = parsed(text, tmp_path)
    path, counts, before, after = passed(graph, "rotation before heads")
    assert counts == {"rotation before heads": 0} and after == before  # a Cast is between
    graph = parsed(GRAPH.replace("INTERLEAVED", "1"), tmp_path)
    path, counts, before, after = passed(graph, "narrow rotation", "rotation before heads")
    assert counts == {"narrow rotation": 2, "rotation before heads": 0}  # the graph's outputs are the rotations
    text = GRAPH.replace("y = Cast <to = 10> (turned)", "y2 = Cast <to = 10> (turned)\n y = Neg(y2)")
    graph = parsed(text.replace("INTERLEAVED", "1"), tmp_path)
    path, counts, _, after = passed(graph, "narrow rotation", "rotation before heads")
    assert counts == {"narrow rotation": 2, "rotation before heads": 1}
    narrow, _, _, _ = passed(graph, "narrow rotation")
    assert after["Transpose"] == 2
    expected = computed(narrow, given())
    path, _, _, _ = passed(graph, "narrow rotation", "rotation before heads")
    np.testing.assert_array_equal(computed(path, given())[0], expected[0])


def test_fp32_is_left_alone(tmp_path: Path) -> None:
    text = GRAPH.replace("INTERLEAVED", "1").replace("float16", "float").replace("to = 10", "to = 1")
    assert passed(parsed(text, tmp_path), "narrow rotation")[1] == {"narrow rotation": 0}
