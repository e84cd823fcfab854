"""The sizes that engines are compiled for, and what a server announces of them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st
from published import MODEL

from ditforge.client.options import GenerateOptions
from ditforge.client.request import make_request
from ditforge.engines.profile import Profile, announced, default_range, make_profiles, tiled
from ditforge.errors import UserError
from ditforge.manifest import Tensor
from ditforge.model import Model

LATENTS = Tensor(dtype="FP32", shape=("batch", 16, "latent_height", "latent_width"))
IMAGE = Tensor(dtype="UINT8", shape=("batch", "height", "width", 3))


def test_the_default_is_around_the_models_size() -> None:
    (profile,) = make_profiles(MODEL, None, None, None)
    assert profile.shapes(LATENTS, MODEL) == ((1, 16, 64, 64), (1, 16, 128, 128), (4, 16, 192, 192))
    assert profile.shapes(IMAGE, MODEL) == ((1, 512, 512, 3), (1, 1024, 1024, 3), (4, 1536, 1536, 3))
    assert profile.shapes(Tensor(dtype="INT32", shape=("batch", 77)), MODEL) == ((1, 77), (1, 77), (4, 77))


@given(multiple=st.sampled_from([8, 16, 32]), default=st.integers(1, 64), ratio=st.integers(1, 4))
def test_the_default_is_always_a_range_of_the_model(multiple: int, default: int, ratio: int) -> None:
    sizes = {"size_multiple": multiple, "default_size": default * multiple, "max_size": default * multiple * ratio}
    model = MODEL.model_copy(update=sizes)
    smallest, best, largest = default_range(model)
    assert multiple <= smallest <= best <= largest <= model.max_size
    assert [size % multiple for size in (smallest, best, largest)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("resolutions", "sizes"),
    [
        ("512-1536", (512, 1024, 1536)),
        ("512-768", (512, 768, 768)),
        ("1280-2048", (1280, 1280, 2048)),
        ("256-512-768", (256, 512, 768)),
        ("1024-1024", (1024, 1024, 1024)),
    ],
)
def test_resolutions(resolutions: str, sizes: tuple[int, int, int]) -> None:
    (profile,) = make_profiles(MODEL, resolutions, None, 2)
    assert (profile.smallest[0], profile.best[1], profile.largest[0]) == sizes
    assert profile.max_batch == 2


def test_static_sizes_are_a_profile_each_width_first() -> None:
    profiles = make_profiles(MODEL, None, "1344x768, 1024x1024", None)
    assert [profile.best for profile in profiles] == [(768, 1344), (1024, 1024)]
    smallest, best, largest = profiles[0].shapes(LATENTS, MODEL)
    assert smallest == best == (1, 16, 96, 168)
    assert largest == (4, 16, 96, 168)


@pytest.mark.parametrize(
    ("options", "problem", "fix"),
    [
        ({"resolutions": "1536-512"}, "the smallest, 1536, is above the largest, 512", 'resolutions="512-1536"'),
        ({"resolutions": "512-2048-1024"}, "the best, 2048, is not from 512 to 1024", "resolutions="),
        ({"resolutions": "500-1024"}, "divisible by 16, got 500", "496"),
        ({"resolutions": "512-8192"}, "16 to 4096 pixels, got 8192", "resolutions="),
        ({"resolutions": "0-512"}, "got 0", "resolutions="),
        ({"resolutions": "large"}, "large.* is not a range", "512-1536"),
        ({"resolutions": "-512"}, "not a range", "512-1536"),
        ({"static": "1024"}, "1024.* is not a size", "1024x1024"),
        ({"static": "1024x1000"}, "divisible by 16, got 1000", "992|1008"),
        ({"static": "512x512", "resolutions": "512-1024"}, "exclude each other", "one of them"),
        ({"batch": 0}, "from 1 to 128, got 0", "batch=4"),
        ({"batch": 129}, "from 1 to 128, got 129", "batch=4"),
    ],
)
def test_sizes_that_cannot_be(options: dict, problem: str, fix: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        make_profiles(MODEL, **({"resolutions": None, "static": None, "batch": None} | options))
    assert any(part in error.value.fix for part in fix.split("|"))


def ask(model: Model, height: int | None = None, width: int | None = None) -> tuple[int, int]:
    request = make_request(model, ["a"], GenerateOptions(height=height, width=width))
    return request.height, request.width


def test_a_client_is_kept_to_the_range() -> None:
    model = announced(MODEL, make_profiles(MODEL, "256-512-768", None, None))
    assert (model.min_size, model.default_size, model.max_size) == (256, 512, 768)
    assert ask(model) == (512, 512)
    assert ask(model, 256, 768) == (256, 768)
    for size in (240, 784):
        with pytest.raises(UserError, match=f"from 256 to 768 pixels, got {size}"):
            ask(model, height=size)


def test_a_client_is_kept_to_static_sizes() -> None:
    model = announced(MODEL, make_profiles(MODEL, None, "1344x768,1024x1024", None))
    assert ask(model) == (768, 1344)
    assert ask(model, height=1024) == (1024, 1024)
    assert ask(model, width=1344) == (768, 1344)
    with pytest.raises(UserError, match="1024 x 1344") as error:
        ask(model, 1024, 1344)
    assert error.value.fix == " or ".join(
        [
            "height=768 and width=1344",
            "height=1024 and width=1024",
        ]
    )


def test_a_tile_bounds_the_autoencoder_alone() -> None:
    model = tiled(MODEL, 768)
    for resolutions, static, latents in (
        ("512-2048", None, ((1, 16, 64, 64), (1, 16, 96, 96), (4, 16, 96, 96))),
        ("512-640", None, ((1, 16, 64, 64), (1, 16, 80, 80), (4, 16, 80, 80))),
        ("1024-2048", None, ((1, 16, 96, 96), (1, 16, 96, 96), (4, 16, 96, 96))),
        (None, "2048x512", ((1, 16, 64, 96), (1, 16, 64, 96), (4, 16, 64, 96))),
    ):
        (profile,) = make_profiles(model, resolutions, static, None)
        assert profile.of("vae_decoder", model).shapes(LATENTS, model) == latents
        image = tuple((batch, 8 * h, 8 * w, 3) for batch, _, h, w in latents)
        assert profile.of("vae_encoder", model).shapes(IMAGE, model) == image
        assert profile.of("dit", model) == profile
        assert profile.of("vae_decoder", MODEL) == profile
        assert announced(model, [profile]) == announced(MODEL, [profile]).model_copy(update={"vae_tile": 768})


@pytest.mark.parametrize(
    ("tile", "near"), [(0, 128), (-8, 128), (120, 128), (1020, 1024), (1023, 1024), (4104, 4096), (10**20, 4096)]
)
def test_tiles_that_cannot_be(tile: int, near: int) -> None:
    with pytest.raises(UserError, match=f"from 128 to 4096 pixels and divisible by 8, got {tile}") as error:
        tiled(MODEL, tile)
    assert error.value.fix == f"vae_tile={near}"
    assert tiled(MODEL, near).vae_tile == near


@pytest.mark.parametrize("option", ["static", "resolutions"])
@pytest.mark.parametrize("size", ["1024x1024", "100x96", "8x8", "96", "9999x1"])
def test_the_fix_does_not_fail_like_what_it_is_for(option: str, size: str) -> None:
    small = MODEL.model_copy(update={"size_multiple": 16, "default_size": 128, "max_size": 512})

    def made(text: str) -> list[Profile]:
        resolutions, static = (None, text) if option == "static" else (text.replace("x", "-"), None)
        return make_profiles(small, resolutions, static, None)

    with pytest.raises(UserError) as error:
        made(size)
    fix = re.match(rf'{option}="([\dx-]+)"', error.value.fix)
    assert fix and made(fix[1])
