"""Whether an export fits on the disk: found out before it starts."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ditforge.errors import UserError
from ditforge.export.network import Network
from ditforge.option import option

GRAPHS = 50 * 10**6  # bytes for what is not weights: graphs, tokenizers, the manifest


def size_of(network: Network, shapes: Mapping[str, tuple[int, ...]], scheme: str | None) -> int:
    """Bytes that the network's weights will take, by their names and `shapes`, but for scales."""

    def width(name: str) -> int:
        return 1 if scheme and network.may_be_8_bit(name) else network.dtype.itemsize

    return sum(math.prod(shape) * width(name) for name, shape in shapes.items())


def check_space(out: Path, size: int) -> None:
    """Raise UserError if the disk of `out`, which need not exist, has no room for `size` bytes of weights."""
    parent = Path(os.path.realpath(out)).parent
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
