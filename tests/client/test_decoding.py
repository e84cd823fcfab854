"""Tiled decoding against decoding whole, and against diffusers' AutoencoderKL.enable_tiling."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings, strategies as st
from pictures import LAST_BIT, largest_difference

from ditforge.client import AsyncClient, Client
from ditforge.client.calls import Calls
from ditforge.client.decoding import Decoder, decode, starts, weights
from ditforge.client.options import GenerateOptions
from ditforge.client.picture_file import read_info
from ditforge.client.request import make_request
from ditforge.engines.build import BuildOptions, build
from ditforge.errors import UserError
from ditforge.model import Model, Schedule
from ditforge.triton_repo.repository import write_repository
from ditforge.triton_repo.server import Server, start

FACTOR = 8
TILE = 256
SIZE = 400, 520
SCENES = range(3)


MODEL = Model(
    name="tiny",
    latent_channels=16,
    vae_factor=FACTOR,
    size_multiple=16,
    default_size=128,
    max_size=512,
    default_steps=4,
    guidance="none",
    default_guidance=0.0,
    schedule=Schedule(kind="fixed"),
    max_tokens={"t5": 8},
)


def ask(model: Model, tile: Any = None, height: int | None = 512, width: int | None = 512) -> int | None:
    """The tile of a request."""
    return make_request(model, ["a"], GenerateOptions(height=height, width=width, vae_tile=tile)).vae_tile


def enlarge(latents: np.ndarray) -> np.ndarray:
    """A decoder without neighbours: each latent's first three channels become 8 x 8 pixels of that colour."""
    assert latents.dtype == np.float32
    return latents[:, :3].repeat(FACTOR, 2).repeat(FACTOR, 3).transpose(0, 2, 3, 1).astype(np.uint8)


def random_latents(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, 4, height, width)).astype(np.float32)


@given(length=st.integers(1, 300), tile=st.integers(16, 128), factor=st.sampled_from([2, 8]))
def test_tiles_cover_everything_and_weights_sum_to_one(length: int, tile: int, factor: int) -> None:
    begin = starts(length, tile)
    assert begin[0] == 0
    assert begin[-1] + tile == max(length, tile)
    assert all(0 < b - a <= tile - tile // 4 for a, b in pairwise(begin))  # a quarter is shared
    total, size = np.zeros(length * factor), min(tile, length) * factor
    for share, at in zip(weights(begin, length, tile, factor), begin, strict=True):
        assert share.shape == (size,)
        assert share.min() >= 0
        inner = share[factor // 4 : -factor // 4]
        assert np.abs(np.diff(inner)).max(initial=0) < 0.5  # no seam
        total[at * factor : at * factor + size] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 90), width=st.integers(1, 90), tile=st.integers(16, 40), batch=st.integers(1, 2))
def test_tiles_of_a_local_decoder_make_the_same_picture(height: int, width: int, tile: int, batch: int) -> None:
    latents, shapes = random_latents(batch, height, width), set()

    def decoder(piece: np.ndarray) -> np.ndarray:
        shapes.add(piece.shape)
        return enlarge(piece)

    picture = decode(decoder, latents, FACTOR, tile * FACTOR)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, enlarge(latents))
    fits = max(height, width) <= tile
    assert shapes == {(batch if fits else 1, 4, min(height, tile), min(width, tile))}  # all of one shape


def test_a_picture_that_fits_is_decoded_whole() -> None:
    latents = random_latents(3, 32, 20)
    for tile in (None, 256, 1024):
        taken: list[np.ndarray] = []
        decode(lambda piece, taken=taken: (taken.append(piece), enlarge(piece))[1], latents, FACTOR, tile)
        assert len(taken) == 1
        assert taken[0] is latents


# flux-tiny's decoder


@torch.no_grad()
def as_pixels(decoder: Callable[[torch.Tensor], torch.Tensor], latents: np.ndarray) -> np.ndarray:
    pictures = decoder(torch.from_numpy(latents))
    return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8).numpy()


@torch.no_grad()
def scene_latents(vae: AutoencoderKL, seed: int) -> np.ndarray:
    """The latents [1, 16, h, w] of a drawn scene."""
    import scenes

    rng = random.Random(seed)
    picture = scenes.draw([scenes.sample_scene(rng)], *SIZE, seed)
    return vae.encode(picture * 2 - 1).latent_dist.mode().numpy()


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) - b.astype(np.float64)


def psnr(error: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean(error**2))


def seam(picture: np.ndarray, whole: np.ndarray, *edges: Iterable[int]) -> float:
    """How much steeper a picture is than the whole one at rows and columns of pixels: the worst one's mean, of 255.

    Where the whole one is flat, as one sees seams; outlines may be sharper in the one or the other.
    """

    def steps(image: np.ndarray, axis: int, at: int) -> np.ndarray:
        return np.abs(np.diff(image.take((at - 1, at), axis).astype(np.float64), axis=axis)).max(2)

    inside = [(axis, at) for axis in (0, 1) for at in edges[axis] if 0 < at < whole.shape[axis]]
    flat = [(steps(picture, *line), steps(whole, *line)) for line in inside]
    return max((ours - theirs)[theirs < 8].mean() for ours, theirs in flat)


def edges_of_tiles(length: int) -> list[int]:
    return [at * FACTOR + end for at in starts(length // FACTOR, TILE // FACTOR) for end in (0, TILE)]


def cut(decoder: Decoder, latents: np.ndarray) -> np.ndarray:
    """The picture of tiles side by side, each to the middle of what it shares, and not blended."""
    size, middle = TILE // FACTOR, TILE // 8
    picture = np.empty((*SIZE, 3), np.uint8)
    for top, left in product(*(starts(length // FACTOR, size) for length in SIZE)):
        piece = decoder(latents[:, :, top : top + size, left : left + size])[0]
        skip = [middle if at else 0 for at in (top, left)]
        picture[top * FACTOR + skip[0] :, left * FACTOR + skip[1] :][: TILE - skip[0], : TILE - skip[1]] = piece[
            skip[0] :, skip[1] :
        ]
    return picture


@dataclass(frozen=True)
class Decoded:
    """One scene, decoded in four ways."""

    whole: np.ndarray
    tiled: np.ndarray
    diffusers: np.ndarray
    cut: np.ndarray


@pytest.fixture(scope="module")
def decoded(flux_tiny: Path) -> list[Decoded]:
    vae = AutoencoderKL.from_pretrained(flux_tiny / "vae").eval()
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, TILE // FACTOR

    def decoder(latents: np.ndarray) -> np.ndarray:
        return as_pixels(vae.decoder, latents)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(flux_tiny.parent)  # models/, which is not an installed package
        scenes = {seed: scene_latents(vae, seed) for seed in SCENES}
    found = []
    for latents in scenes.values():
        theirs = as_pixels(lambda z: vae.decode(z).sample, latents)
        tiled = decode(decoder, latents, FACTOR, TILE)
        found.append(Decoded(decoder(latents)[0], tiled[0], theirs[0], cut(decoder, latents)))
    return found


@pytest.mark.slow
def test_tiles_are_nearer_to_the_whole_picture_than_diffusers_tiles(decoded: list[Decoded]) -> None:
    """Not the same: norms and attention over a tile are others than over the picture, for both."""
    for each in decoded:
        assert psnr(difference(each.tiled, each.whole)) > psnr(difference(each.diffusers, each.whole))


@pytest.mark.slow
def test_tiles_have_no_seam_where_a_cut_has_one(decoded: list[Decoded]) -> None:
    edges = [edges_of_tiles(length) for length in SIZE]
    middles = [[at + TILE // 8 for at in along[2::2]] for along in edges]
    theirs = [range(0, length, TILE * 3 // 4) for length in SIZE]
    ours = [max(seam(d.tiled, d.whole, *edges), seam(d.tiled, d.whole, *middles)) for d in decoded]
    unblended = [seam(d.cut, d.whole, *middles) for d in decoded]
    assert max(ours) < 0.5  # half of one of 255 levels cannot be seen
    assert sum(unblended) > 10 * sum(ours)
    assert sum(seam(d.diffusers, d.whole, *theirs) for d in decoded) > sum(ours)


# What may be asked for


@pytest.mark.parametrize(
    ("model", "tile", "problem", "fix"),
    [
        ({}, 120, "from 128 to 512 pixels, got 120", "vae_tile=128"),
        ({}, 520, "from 128 to 512 pixels, got 520", "vae_tile=512"),
        ({}, 300, "divisible by 8, got 300", "vae_tile=296"),
        ({}, True, "got True", "vae_tile=512"),
        ({}, "256", "got '256'", "vae_tile=512"),
        ({"vae_tile": 256}, 264, "from 128 to 256 pixels, got 264", "vae_tile=256"),
        ({"vae_tile": 256, "min_size": 192}, 184, "from 192 to 256 pixels, got 184", "vae_tile=192"),
        ({"vae_tile": 256, "min_size": 384}, 248, "from 256 to 256 pixels, got 248", "vae_tile=256"),
        ({"sizes": ((512, 512),)}, 256, "fixed sizes, and vae_tile cannot be 256", "leave out vae_tile"),
        ({"sizes": ((512, 512),), "vae_tile": 256}, 128, "fixed sizes, and vae_tile cannot be 128", "vae_tile=256"),
    ],
)
def test_tiles_that_cannot_be(model: dict, tile: object, problem: str, fix: str) -> None:
    with pytest.raises(UserError, match=problem) as error:
        ask(MODEL.model_copy(update=model), tile)
    assert error.value.fix == fix


def test_a_tile_is_used_where_the_picture_is_larger() -> None:
    tiling = MODEL.model_copy(update={"vae_tile": 256})
    assert [ask(MODEL), ask(MODEL, 256), ask(MODEL, 512), ask(tiling), ask(tiling, 128)] == [None, 256, None, 256, 128]
    assert ask(tiling, height=256, width=256) is None
    assert ask(tiling, height=256, width=272) == 256
    fixed = tiling.model_copy(update={"sizes": ((512, 256),)})
    assert ask(fixed, height=None, width=None) == ask(fixed, 256, height=None, width=None) == 256


# Through a server


@pytest.fixture(scope="module")
def tiling_server(tiny, shared) -> Iterator[Server]:
    """A server of flux-tiny whose decoder is said to take tiles of 256 pixels."""

    def make(out: Path) -> None:
        build(tiny.onnx, out / "engines", BuildOptions("cpu", vae_tile=TILE))
        write_repository(out / "engines", out / "repo")

    with start(shared("tiny-tiles", make) / "repo", port=0) as server:
        yield server


def test_the_server_says_which_tiles_it_takes(tiling_server: Server, tiny_server: Server) -> None:
    options = {"seed": 0, "steps": 4, "height": 256, "width": 400}
    with Client(tiling_server.url) as tiling, Client(tiny_server.url) as plain:
        assert (tiling.model.vae_tile, plain.model.vae_tile) == (TILE, None)
        assert tiling.model.max_size == plain.model.max_size == 512
        tiled = tiling.generate("a large red circle", **options)
        whole = plain.generate("a large red circle", **options)
        asked = plain.generate("a large red circle", vae_tile=TILE, **options)
        small = tiling.generate("a large red circle", seed=0, steps=2)
        same = plain.generate("a large red circle", seed=0, steps=2)
        with pytest.raises(UserError, match="vae_tile must be from 128 to 256 pixels, got 512"):
            tiling.generate("a", vae_tile=512)
    assert read_info(tiled) == {**read_info(whole), "vae_tile": TILE} == read_info(asked)
    assert largest_difference(tiled, asked) <= LAST_BIT < largest_difference(tiled, whole)
    assert psnr(difference(np.asarray(tiled), np.asarray(whole))) > 30
    assert largest_difference(small, same) <= LAST_BIT
    assert "vae_tile" not in read_info(small)


def test_a_cancelled_task_decodes_no_more_tiles(tiling_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task is cancelled while the first of twelve tiles is in the server."""
    infer, calls = Calls.infer, list[str]()
    tasks: list[asyncio.Task[Any]] = []

    def watched(self: Calls, name: str, inputs: Mapping[str, np.ndarray], step: str = "") -> dict[str, np.ndarray]:
        calls.append(name)
        if name == "vae_decoder":
            asyncio.get_running_loop().call_soon(tasks[0].cancel)
        return infer(self, name, inputs, step)

    async def main() -> None:
        async with AsyncClient(tiling_server.url) as client:
            task = asyncio.create_task(client.generate("a", steps=1, height=512, width=512, vae_tile=160))
            tasks.append(task)
            with pytest.raises(asyncio.CancelledError):
                await task
            await client.generate("a", steps=1)  # meanwhile, a loop that went on would go on

    monkeypatch.setattr(Calls, "infer", watched)
    asyncio.run(main())
    assert calls.count("vae_decoder") == 1 + 1
