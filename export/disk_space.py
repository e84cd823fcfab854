"""Check that an export fits on the disk before it starts."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ditforge.errors import UserError
from ditforge.export.network import Network
from ditforge.option import option
from ditforge.real_path import real_path

GRAPHS = 50 * 10**6  # bytes reserved for everything but weights: graphs, tokenizers, the manifest


def size_of(network: Network, shapes: Mapping[str, tuple[int, ...]], scheme: str | None) -> int:
    """Return how many bytes the network's weights will take on the disk, without the scales of 8-bit weights.

    `shapes` maps the name of each weight to its shape. `scheme` is the 8-bit format, or None.
    """

    def width(name: str) -> int:
        return 1 if scheme and network.may_be_8_bit(name) else network.dtype.itemsize

    return sum(math.prod(shape) * width(name) for name, shape in shapes.items())


def check_space(out: Path, size: int) -> None:
    """Raise UserError if the disk that will hold `out` is read-only or has no room for `size` bytes of weights.

    `out` need not exist yet.
    """
    parent = real_path(out).parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    if os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise UserError(
            f"cannot write {out}: {parent} is on a file system that is read-only", f"choose another {option('out')}"
        )
    free = shutil.disk_usage(parent).free
    if free < size + GRAPHS:
        wanted = f"this export takes {(size + GRAPHS) / 1e9:.2f} GB, and {parent} has {free / 1e9:.2f} GB free"
        raise UserError(wanted, f"free some space, or choose an {option('out')} on a larger disk")
