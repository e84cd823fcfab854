"""How far apart two pictures are."""

from __future__ import annotations

import numpy as np
from PIL import Image

# The same request may be summed in another order: in another process, batch or memory, and on another CPU. A level that
# lies in the middle between two is then rounded the other way.
LAST_BIT = 1


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    """Of their levels, 0 … 255."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)).max())
