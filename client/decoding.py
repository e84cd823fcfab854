"""Decodes latents to pictures, either whole or in overlapping tiles.

Tiles are used if the decoder's engine takes no larger pieces, or if the user wants to save memory. In a tile, the
decoder sees neither the pixels around the tile (at its edge, zeros stand in for them) nor the rest of the picture, over
which its norms and its attention are computed. Two tiles therefore differ a little where they overlap, and are blended.
The weight of a tile falls to 0 before its edge, where its pixels are wrong, and it falls over a long distance, so that
the other differences do not show.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Decoder = Callable[[Array], Pixels]

OVERLAP = 4  # neighbours share at least a quarter of a tile, as in diffusers' AutoencoderKL.enable_tiling
EDGE = 8  # the outermost eighth of the overlap, at the edge of each tile, gets no weight


def decode(decoder: Decoder, latents: Array, factor: int, tile: int | None) -> Pixels:
    """Decode latents, float32 [B, C, h, w], to pictures, uint8 [B, H, W, 3]. H is h * `factor`, and W is w * `factor`.

    `decoder` does the same for pieces of at most `tile` x `tile` pixels, or of any size if `tile` is None. A larger
    picture is decoded tile by tile, with tiles of one shape. Only one row of tiles is in memory beside the picture.
    """
    if tile is None or max(latents.shape[2:]) * factor <= tile:
        return decoder(latents)
    return np.stack([decode_tiled(decoder, latents[[i]], factor, tile // factor) for i in range(len(latents))])


def decode_tiled(decoder: Decoder, latents: Array, factor: int, tile: int) -> Pixels:
    """Decode latents [1, C, h, w] to a picture, uint8 [H, W, 3], in tiles of `tile` x `tile` latents, one at a time."""
    height, width = latents.shape[2:]
    tops, lefts = starts(height, tile), starts(width, tile)
    down, across = weights(tops, height, tile, factor), weights(lefts, width, tile, factor)
    picture = np.empty((height * factor, width * factor, 3), np.uint8)
    band = np.zeros((min(tile, height) * factor, width * factor, 3), np.float32)  # the current row of tiles, blended
    for top, next_top, vertical in zip(tops, [*tops[1:], height], down, strict=True):
        for left, horizontal in zip(lefts, across, strict=True):
            piece = decoder(latents[:, :, top : top + tile, left : left + tile])[0]
            columns = slice(left * factor, left * factor + piece.shape[1])
            band[:, columns] += piece * (vertical[:, None] * horizontal)[:, :, None]
        done = (next_top - top) * factor  # these lines are finished, because the next row of tiles begins below them
        picture[top * factor : next_top * factor] = np.rint(band[:done])
        band[:-done] = band[done:]
        band[-done:] = 0
    return picture


def starts(length: int, tile: int) -> list[int]:
    """The positions at which tiles of length `tile` begin along `length`; the last tile ends at the end.

    They are spread evenly, and are the fewest that overlap by at least a quarter of a tile.
    """
    if length <= tile:
        return [0]
    steps = -(-(length - tile) // (tile - tile // OVERLAP))
    return [k * (length - tile) // steps for k in range(steps + 1)]


def weights(starts: list[int], length: int, tile: int, factor: int) -> Array:
    """The weight of each tile at each of its pixels along one axis, float32 [tiles, pixels].

    At each pixel of the picture, the weights of all tiles sum to 1. A tile's weight rises linearly, beginning at some
    distance from the tile's edge; at an edge of the picture, it does not fall.
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
