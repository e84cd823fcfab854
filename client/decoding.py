"""Latents to pictures: whole, or in overlapping tiles where the decoder takes or shall take no more at once.

In a tile, the decoder sees neither the neighbours (at the edge, zeros stand in for them) nor the whole picture, over
which its norms and its attention go. So tiles do not quite agree where they overlap, and they are blended: the weight
of each falls to nothing before its edge, where it is wrong, and over a long way, so that what else differs fades.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Decoder = Callable[[Array], Pixels]

OVERLAP = 4  # neighbours share at least a quarter of a tile, as in diffusers' AutoencoderKL.enable_tiling
EDGE = 8  # an eighth of what they share, at the edge of each tile, has no weight


def decode(decoder: Decoder, latents: Array, factor: int, tile: int | None) -> Pixels:
    """The pictures uint8 [B, H, W, 3] of latents float32 [B, C, h, w], a latent being `factor` pixels wide.

    `decoder` does the same for what is at most `tile` pixels high and wide (None: for anything). What is larger goes
    through it tile by tile, all of one shape; beside the picture, a row of tiles is in memory.
    """
    if tile is None or max(latents.shape[2:]) * factor <= tile:
        return decoder(latents)
    return np.stack([decode_tiled(decoder, latents[[i]], factor, tile // factor) for i in range(len(latents))])


def decode_tiled(decoder: Decoder, latents: Array, factor: int, tile: int) -> Pixels:
    """The picture uint8 [H, W, 3] of latents [1, C, h, w], from tiles of `tile` latents. One is decoded at a time."""
    height, width = latents.shape[2:]
    tops, lefts = starts(height, tile), starts(width, tile)
    down, across = weights(tops, height, tile, factor), weights(lefts, width, tile, factor)
    picture = np.empty((height * factor, width * factor, 3), np.uint8)
    band = np.zeros((min(tile, height) * factor, width * factor, 3), np.float32)  # a row of tiles, from its top on
    for top, next_top, vertical in zip(tops, [*tops[1:], height], down, strict=True):
        for left, horizontal in zip(lefts, across, strict=True):
            piece = decoder(latents[:, :, top : top + tile, left : left + tile])[0]
            columns = slice(left * factor, left * factor + piece.shape[1])
            band[:, columns] += piece * (vertical[:, None] * horizontal)[:, :, None]
        done = (next_top - top) * factor  # later tiles begin below
        picture[top * factor : next_top * factor] = np.rint(band[:done])
        band[:-done] = band[done:]
        band[-done:] = 0
    return picture


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin along `length`, as few as overlap enough, evenly spread: the last one ends where all does."""
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // (tile - tile // OVERLAP))
    return [k * (length - tile) // steps for k in range(steps + 1)]


def weights(starts: list[int], length: int, tile: int, factor: int) -> Array:
    """What each tile counts at each of its pixels: [tiles, pixels] float32. At each pixel of the picture, that is 1.

    Linear ramps, which begin at some distance from a tile's edge; none at the edge of the picture.
    """
    size = min(tile, length) * factor
    edge = tile // OVERLAP * factor / EDGE
    pixel = np.arange(size) + 0.5
    ramps = np.full((len(starts), size), float(size))
    total = np.zeros(length * factor)
    for ramp, start in zip(ramps, starts, strict=True):
        if start > 0:
            ramp[:] = pixel - edge
        if start + tile < length:
            np.minimum(ramp, size - pixel - edge, out=ramp)
        np.maximum(ramp, 0, out=ramp)
        total[start * factor : start * factor + size] += ramp
    shares = [ramp / total[start * factor :][:size] for ramp, start in zip(ramps, starts, strict=True)]
    return np.array(shares, np.float32)
