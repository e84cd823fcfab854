"""Checks and chooses the sizes of pictures, and of the tiles in which they are decoded."""

from __future__ import annotations

import math
import re
from numbers import Integral

from ditforge.errors import UserError
from ditforge.model import LEAST_TILE, Model
from ditforge.option import option, setting

SHAPES = {"square": (1, 1), "portrait": (3, 4), "landscape": (4, 3)}  # the ratio of width to height
LARGEST_RATIO = 8
PIXELS = re.compile(r"(\d{1,6})x(\d{1,6})")
RATIO = re.compile(r"(\d{1,4}):(\d{1,4})")
SIZES = "WIDTHxHEIGHT, square, portrait, landscape, or a ratio such as 16:9"


def parse_size(size: str) -> tuple[int, int] | float:
    """Read a size. Returns (width, height) in pixels for "WIDTHxHEIGHT", or the ratio of width to height for a shape.

    A shape is "square", "portrait", "landscape", or a ratio such as "16:9". Raises UserError for anything else.
    """
    text = size.strip().lower() if isinstance(size, str) else ""
    if pixels := PIXELS.fullmatch(text):
        return int(pixels[1]), int(pixels[2])
    ratio = RATIO.fullmatch(text)
    width, height = (int(ratio[1]), int(ratio[2])) if ratio else SHAPES.get(text, (0, 0))
    if not 0 < width <= LARGEST_RATIO * height or height > LARGEST_RATIO * width:
        raise UserError(
            f"{option('size')} must be {SIZES}, up to {LARGEST_RATIO}:1; got {size!r}", option('size="16:9"')
        )
    return width / height


def choose_size(height: int | None, width: int | None, size: str | None, model: Model) -> tuple[int, int]:
    """The height and width of the picture in pixels, by default the model's.

    Raises UserError if the model cannot make a picture of that size.
    """
    if size is not None:
        parsed = parse_size(size)
        if isinstance(parsed, float):
            return shaped(size, parsed, model)
        return choose_pixels(size, parsed, model)
    if not model.sizes:
        height = check_size("height", model.default_size if height is None else height, model)
        return height, check_size("width", model.default_size if width is None else width, model)
    for made in model.sizes:
        if height in (None, made[0]) and width in (None, made[1]):
            return made
    asked = f"{'any' if height is None else height} x {'any' if width is None else width}"
    problem = f"the engines were built for fixed sizes, and {asked} (height x width) is none of them"
    raise UserError(problem, " or ".join(f"{option(f'height={h}')} and {option(f'width={w}')}" for h, w in model.sizes))


def choose_pixels(size: str, pixels: tuple[int, int], model: Model) -> tuple[int, int]:
    """The height and width of a picture of so many `pixels`, (width, height), which were given as `size`.

    Raises UserError if the model cannot make it.
    """
    width, height = pixels
    if model.sizes:
        if (height, width) not in model.sizes:
            problem = f"the engines were built for fixed sizes, and {size.strip()} is none of them"
            raise UserError(problem, fixed_sizes(model))
        return height, width
    least, most = bounds(model)
    better = nearest(width, model), nearest(height, model)
    if better != pixels:
        sides = f"sides from {least} to {most} pixels that are divisible by {model.size_multiple}"
        raise UserError(f"{option('size')} must have {sides}, got {size!r}", setting("size", "{}x{}".format(*better)))
    return height, width


def fixed_sizes(model: Model) -> str:
    """The option, for the advice in errors, that gives each size of a model with fixed sizes."""
    return " or ".join(str(setting("size", f"{width}x{height}")) for height, width in model.sizes)


def bounds(model: Model) -> tuple[int, int]:
    """The smallest and the largest side of a picture, in pixels, of a model without fixed sizes."""
    multiple = model.size_multiple
    return -(-max(model.min_size, multiple) // multiple) * multiple, model.max_size // multiple * multiple


def nearest(side: int, model: Model) -> int:
    """The side of a picture, in pixels, that the model can make and that is nearest to `side`."""
    least, most = bounds(model)
    return min(max(round(side / model.size_multiple) * model.size_multiple, least), most)


def shaped(size: str, ratio: float, model: Model) -> tuple[int, int]:
    """The height and width of a picture with about that ratio of width to height, and as many pixels as by default.

    Each side is rounded to one that the model can make. For a model with fixed sizes, it is the size with the nearest
    ratio; raises UserError if that is off by more than 10 %.
    """
    if model.sizes:
        height, width = min(model.sizes, key=lambda made: abs(math.log(made[1] / made[0] / ratio)))
        if abs(math.log(width / height / ratio)) > 0.1:
            problem = f"the engines were built for fixed sizes, and none of them is {size}"
            raise UserError(problem, fixed_sizes(model))
        return height, width
    multiple = model.size_multiple
    least, most = (side // multiple for side in bounds(model))
    short = max(least, round(model.default_size / math.sqrt(max(ratio, 1 / ratio)) / multiple))
    long = round(short * max(ratio, 1 / ratio))
    if long > most:
        long, short = most, max(least, round(most / max(ratio, 1 / ratio)))
    sides = short * multiple, long * multiple
    return sides if ratio >= 1 else (sides[1], sides[0])


def check_size(name: str, value: int, model: Model) -> int:
    """Return `value`, in pixels. Raises UserError if the model cannot make a picture of that height or width.

    `name` is the option: height or width.
    """
    multiple = model.size_multiple
    least, most = bounds(model)
    if not isinstance(value, Integral) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(
            f"{option(name)} must be from {least} to {most} pixels, got {value!r}",
            option(f"{name}={model.default_size}"),
        )
    if value % multiple:
        better = option(f"{name}={nearest(int(value), model)}")
        raise UserError(f"{option(name)} must be divisible by {multiple}, got {value}", better)
    return int(value)


def choose_vae_tile(vae_tile: int | None, height: int, width: int, model: Model) -> int | None:
    """The side in pixels of the tiles to decode in, by default the largest that the engines take.

    None if the whole picture is decoded at once. Raises UserError for a size of tiles that the model does not take.
    """
    tile = model.vae_tile if vae_tile is None else check_vae_tile(vae_tile, model)
    return None if tile is None or max(height, width) <= tile else tile


def check_vae_tile(vae_tile: int, model: Model) -> int:
    """Return `vae_tile`, in pixels. Raises UserError if the model's decoder takes no tiles of that size."""
    multiple, largest = model.vae_factor, model.max_size if model.vae_tile is None else model.vae_tile
    if model.sizes and vae_tile != model.vae_tile:  # the decoder takes only the fixed sizes, or its own tiles
        tile = option("vae_tile")
        fix = f"leave out {tile}" if model.vae_tile is None else option(f"vae_tile={model.vae_tile}")
        problem = f"the engines were built for fixed sizes, and {tile} cannot be {vae_tile!r}"
        raise UserError(problem, fix)
    most = largest // multiple * multiple
    least = min(-(-max(multiple * LEAST_TILE, model.min_size) // multiple) * multiple, most)
    if not isinstance(vae_tile, Integral) or isinstance(vae_tile, bool):
        raise UserError(
            f"{option('vae_tile')} must be a number of pixels, got {vae_tile!r}", option(f"vae_tile={most}")
        )
    better = option(f"vae_tile={min(max(vae_tile // multiple * multiple, least), most)}")
    if not least <= vae_tile <= most:
        raise UserError(f"{option('vae_tile')} must be from {least} to {most} pixels, got {vae_tile}", better)
    if vae_tile % multiple:
        raise UserError(f"{option('vae_tile')} must be divisible by {multiple}, got {vae_tile}", better)
    return int(vae_tile)
