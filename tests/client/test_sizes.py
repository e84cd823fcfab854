"""Sizes by their shape."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, strategies as st
from published import MODEL

from ditforge.client.sizes import check_vae_tile, choose_size, parse_size
from ditforge.errors import UserError
from ditforge.model import Model


def size(text: str, model: Model = MODEL) -> tuple[int, int]:
    """(width, height)"""
    height, width = choose_size(None, None, text, model)
    return width, height


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("768x512", (768, 512)),
        ("square", (1024, 1024)),
        ("landscape", (1168, 880)),
        ("portrait", (880, 1168)),
        ("16:9", (1360, 768)),
        ("9:16", (768, 1360)),
        ("Square", (1024, 1024)),
    ],
)
def test_size(text: str, expected: tuple[int, int]) -> None:
    assert size(text) == expected


@given(st.integers(1, 99), st.integers(1, 99), st.sampled_from([96, 128, 512, 1024]), st.sampled_from([8, 16, 32, 64]))
def test_a_shape_is_near_what_was_asked(width: int, height: int, default: int, multiple: int) -> None:
    model = MODEL.model_copy(update={"default_size": default, "size_multiple": multiple, "max_size": 4 * default})
    if not 1 / 8 <= width / height <= 8:
        with pytest.raises(UserError, match="up to 8:1"):
            size(f"{width}:{height}", model)
        return
    w, h = size(f"{width}:{height}", model)
    assert w % multiple == h % multiple == 0
    assert multiple <= min(w, h) and max(w, h) <= model.max_size
    assert choose_size(h, w, None, model) == (h, w)  # the model can make it
    off = multiple / min(w, h)  # rounding by half a multiple, of the shorter side and then of the longer one
    assert abs(math.log(w / h * height / width)) <= off
    assert abs(math.log(w * h / default**2)) <= 2 * off


def test_the_nearest_of_fixed_sizes() -> None:
    fixed = MODEL.model_copy(update={"sizes": ((1024, 1024), (768, 1344)), "max_size": 1344})
    assert size("16:9", fixed) == (1344, 768)
    assert size("square", fixed) == (1024, 1024)
    with pytest.raises(UserError, match=r'(?s)none of them is 9:16.* or size="1344x768"'):
        size("9:16", fixed)
    with pytest.raises(UserError, match="512x512 is none of them"):
        size("512x512", fixed)


@pytest.mark.parametrize("text", ["", "x", "16", "16:9:4", "0:1", "1:0", "9:1", "-1x64", "64*64", 64, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(UserError, match="size must be WIDTHxHEIGHT"):
        parse_size(text)  # type: ignore[arg-type]


def test_a_size_that_the_model_cannot_make() -> None:
    with pytest.raises(
        UserError, match=r'size must have sides .* divisible by 16, got .700x512.\nfix:   size="704x512"'
    ):
        size("700x512")
    with pytest.raises(UserError, match=r"width must be divisible by 16, got 700\nfix:   width=704"):
        choose_size(512, 700, None, MODEL)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(1, 300), st.sampled_from([8, 16, 64]))
def test_the_advice_is_a_size_that_the_model_can_make(width: int, height: int, least: int, multiple: int) -> None:
    model = MODEL.model_copy(update={"min_size": least, "size_multiple": multiple, "max_size": 1030})
    for asked in ({"size": f"{width}x{height}"}, {"height": height}, {"width": width}):
        options = {"height": None, "width": None, "size": None}
        try:
            choose_size(**{**options, **asked}, model=model)
        except UserError as error:
            name, _, value = error.fix.partition("=")
            choose_size(**{**options, name: json.loads(value)}, model=model)


@given(st.integers(-5, 10_000), st.integers(1, 300), st.none() | st.sampled_from([64, 200, 512]))
def test_the_advice_is_a_tile_that_the_model_can_decode(asked: int, least: int, tile: int | None) -> None:
    model = MODEL.model_copy(update={"min_size": least, "max_size": 1030, "vae_tile": tile})
    try:
        check_vae_tile(asked, model)
    except UserError as error:
        check_vae_tile(int(error.fix.removeprefix("vae_tile=")), model)
