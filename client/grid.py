"""Puts several pictures into one image, a grid."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from PIL import Image

from ditforge.client.picture_file import METADATA_KEY, read_info

WHITE = (255, 255, 255)


def grid_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """The layout of a grid for pictures of these sizes, (width, height) in pixels.

    Returns the number of columns, and the width and height of the grid in pixels. There are as many columns as rows, or
    one more. Each cell is as wide as the widest picture, and as high as the highest.
    """
    columns = math.ceil(math.sqrt(len(sizes)))
    rows = math.ceil(len(sizes) / columns)
    return columns, columns * max(width for width, _ in sizes), rows * max(height for _, height in sizes)


def make_grid(images: Sequence[Image.Image]) -> Image.Image:
    """Make a grid of the pictures, from left to right and from top to bottom. Its `info` has the parameters of each."""
    columns, width, height = grid_size([image.size for image in images])
    cell = width // columns, max(image.height for image in images)
    grid = Image.new("RGB", (width, height), WHITE)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        grid.paste(image, (column * cell[0], row * cell[1]))
    parameters = {"columns": columns, "pictures": [read_info(image) for image in images]}
    grid.info[METADATA_KEY] = json.dumps(parameters, ensure_ascii=False)
    return grid
