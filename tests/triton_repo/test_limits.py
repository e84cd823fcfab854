"""Limits: what the client lets through, the server takes; what is no picture of the model's, it does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from ditforge.client.decoding import decode
from ditforge.client.options import GenerateOptions
from ditforge.client.request import make_request
from ditforge.errors import UserError
from ditforge.manifest import Component, Tensor
from ditforge.model import Model, Schedule
from ditforge.triton_repo.limits import Axis, BadRequest, Limits, limits_of
from ditforge.triton_repo.pictures import IDLE, MOST, REMEMBERED, Pictures

CHANNELS = 4
LATENTS = Tensor(dtype="FP32", shape=("batch", CHANNELS, "latent_height", "latent_width"))
IMAGE = Tensor(dtype="UINT8", shape=("batch", "height", "width", 3))


def component(**inputs: Tensor) -> Component:
    return Component(files={}, precision="fp32", reason="", inputs=inputs, outputs={})


def model(**fields: object) -> Model:
    given = {
        "name": "m",
        "latent_channels": CHANNELS,
        "vae_factor": 8,
        "size_multiple": 16,
        "default_size": 64,
        "max_size": 512,
        "default_steps": 4,
        "guidance": "none",
        "default_guidance": 0.0,
        "schedule": Schedule(kind="fixed"),
        "max_tokens": {},
    }
    return Model.model_validate(given | fields)


def limits(name: str, served: Model, **inputs: Tensor) -> Limits:
    return limits_of(name, component(**inputs), served, 8, {"t5_ids": 293})


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Models as builds make them: a range of sizes, or fixed ones; the autoencoder whole, or in tiles."""
    factor = draw(st.sampled_from([8, 16]))
    multiple = factor * draw(st.sampled_from([1, 2]))
    sides = st.integers(1, 40).map(lambda n: n * multiple)
    fixed = draw(st.lists(st.tuples(sides, sides), max_size=3, unique=True))
    least, most = sorted((draw(sides), draw(sides)))
    tile = draw(st.none() | st.integers(16, 40).map(lambda n: n * factor))
    sizes = {"sizes": fixed, "max_size": max(map(max, fixed))} if fixed else {"min_size": least, "max_size": most}
    default = fixed[0][0] if fixed else least
    return model(vae_factor=factor, size_multiple=multiple, default_size=default, vae_tile=tile, **sizes)


@given(models(), st.data())
def test_what_the_client_asks_for_is_taken(served: Model, data: st.DataObject) -> None:
    """Every size, and every tile of it, that the client does not refuse itself."""
    side = st.integers(1, served.max_size // served.size_multiple + 1).map(lambda n: n * served.size_multiple)
    size = data.draw(st.sampled_from(served.sizes)) if served.sizes else (data.draw(side), data.draw(side))
    tile = data.draw(st.none() | st.integers(1, 50).map(lambda n: n * served.vae_factor))
    try:
        request = make_request(served, ["a"], GenerateOptions(height=size[0], width=size[1], vae_tile=tile))
    except UserError:
        return
    shape = (1, CHANNELS, request.height // served.vae_factor, request.width // served.vae_factor)
    limits("dit", served, latents=LATENTS).check_shape("latents", "FP32", shape)
    decoder = limits("vae_decoder", served, latents=LATENTS)

    def taken(latents: np.ndarray) -> np.ndarray:
        decoder.check_shape("latents", "FP32", latents.shape)
        height, width = (side * served.vae_factor for side in latents.shape[2:])
        return np.zeros((len(latents), height, width, 3), np.uint8)

    decode(taken, np.zeros(shape, np.float32), served.vae_factor, request.vae_tile)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 4, 66, 64), r"2 to 64 in steps of 2, 2 to 64 in steps of 2\], got \[1, 4, 66, 64\]"),
        ((1, 4, 7, 8), "in steps of 2"),
        ((1, 4, 0, 8), "2 to 64"),
        ((9, 4, 8, 8), "the batch of latents is from 1 to 8, got 9"),
        ((0, 4, 8, 8), "got 0"),
        ((1, 5, 8, 8), r"\[batch, 4, "),
        ((1, 4, 8), "got 3 dimensions"),
        ((1, 4, 2**31, 2**33), "2 to 64"),
    ],
)
def test_shapes_that_are_not_taken(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        limits("dit", model(), latents=LATENTS).check_shape("latents", "FP32", shape)


def test_fixed_sizes_are_the_only_ones() -> None:
    served = model(sizes=((64, 96), (128, 128)), max_size=128)
    taken = limits("dit", served, latents=LATENTS)
    for height, width in ((8, 12), (16, 16)):
        taken.check_shape("latents", "FP32", (1, 4, height, width))
    for height, width in ((12, 8), (8, 16), (8, 8)):
        with pytest.raises(BadRequest, match=r"\[batch, 4, 8, 12\] or \[batch, 4, 16, 16\]"):
            taken.check_shape("latents", "FP32", (1, 4, height, width))


def test_values() -> None:
    found = limits("t5", model(), t5_ids=Tensor(dtype="INT32", shape=("batch", 64)))
    found.check_values("t5_ids", np.array([[0, 292]], np.int32))
    for wrong in (-1, 293):
        with pytest.raises(BadRequest, match=f"t5_ids is from 0 to 292, got {wrong}"):
            found.check_values("t5_ids", np.array([[wrong]], np.int32))
    for dtype in (np.float16, np.float32):
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(BadRequest, match="not finite"):
                found.check_finite("x", np.array([1, value], dtype))
        found.check_finite("x", np.array([np.finfo(dtype).max, np.finfo(dtype).min, -0.0], dtype))


def test_the_largest_request() -> None:
    """Eight pictures of 512 pixels, of one byte for each of three colours."""
    assert limits("vae_encoder", model(), image=IMAGE).request_bytes == 8 * 512 * 512 * 3
    assert Axis(least=2, most=8, multiple=2).most == 8


# Pictures in the middle, as a server that stops counts them


def test_a_picture_is_active_until_nobody_asked_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ditforge.triton_repo.pictures.time.monotonic", lambda: now)
    pictures = Pictures()
    with pictures.request("a"):
        now = 1000.0  # a step can take long
        assert pictures.active() == 1
    assert pictures.active() == 1 and pictures.knows("a") and not pictures.knows("b") and not pictures.knows(None)
    now += IDLE + 0.1
    assert pictures.active() == 0
    assert pictures.knows("a"), "it can go on after a pause"
    with pictures.request(None):
        assert pictures.active() == 1
    assert pictures.active() == 0


def test_names_that_a_stranger_invents_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("ditforge.triton_repo.pictures.time.monotonic", lambda: now)
    pictures = Pictures()
    for number in range(MOST + 500):
        with pictures.request(f"picture {number}"):
            pass
    assert len(pictures.known) == MOST
    assert pictures.knows(f"picture {MOST + 499}") and not pictures.knows("picture 0")
    with pictures.request("x" * 1000):
        assert len(pictures.known) == MOST
    now = REMEMBERED + 1
    assert not pictures.knows(f"picture {MOST + 499}")
    assert len(pictures.known) == 0
