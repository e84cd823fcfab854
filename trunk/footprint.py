"""How much of a device's memory a network takes. `export` measures it, and `plan` and `build` compute with it."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ditforge.model import MOST_PIXELS

# Bounds that hold for every network, because a file may claim anything.
Bytes = Annotated[int, Field(ge=0, le=1 << 50)]
Operations = Annotated[int, Field(ge=0, le=1 << 80)]
Side = Annotated[int, Field(gt=0, le=MOST_PIXELS)]


class Footprint(BaseModel):
    """The bytes of memory that a network takes, and the operations that it computes.

    weights: the bytes of all weights.
    largest_block: the bytes of weights of the largest block, which no cut between blocks makes smaller.
    activations: the side of a square picture in pixels → the bytes of activations for one sample. This is the largest
        number of bytes that are alive at the same time.
    flops: the side → the floating point operations for one sample; empty if they were not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: Bytes
    largest_block: Bytes
    activations: dict[Side, Bytes] = Field(min_length=1)
    flops: dict[Side, Operations] = {}

    def activations_at(self, side: float) -> int:
        """The bytes of activations for one picture with side x side pixels, of any shape.

        Activations grow with the number of pixels, or faster: attention without a fused kernel grows with its square.
        Straight lines between the measured sizes are therefore never too low. Beyond the largest of them, a parabola
        through the last three sizes is used.
        """
        points = [(size**2, self.activations[size]) for size in sorted(self.activations)]
        pixels = side**2
        if pixels <= points[0][0]:
            return points[0][1]
        for (left, low), (right, high) in pairwise(points):
            if pixels <= right:
                return round(low + (high - low) * (pixels - left) / (right - left))
        return max(round(through(points[-3:], pixels)), points[-1][1])

    def flops_at(self, side: float) -> float | None:
        """The floating point operations for one picture with side x side pixels, of any shape; None if not counted.

        They grow with the number of pixels, and those of attention with its square, so a parabola through the nearest
        three sizes is used.
        """
        points = sorted((size**2, count) for size, count in self.flops.items())
        if not points:
            return None
        nearest = sorted(points, key=lambda point: abs(point[0] - side**2))[:3]
        return through(sorted(nearest), side**2)

    def attention_at(self, side: float, text_tokens: int, multiple: int) -> float | None:
        """The operations of attention among those of flops_at(); None if they were not counted, or at too few sizes.

        Only attention grows with the square of the number of tokens: those of the text, and one for each square of
        multiple x multiple pixels. So its share follows from how operations grow with the number of pixels.
        """
        nearest = sorted(self.flops, key=lambda known: abs(known**2 - side**2))[:3]
        if len(nearest) < 3:
            return None
        (a, x), (b, y), (c, z) = sorted((known**2 / multiple**2, self.flops[known]) for known in nearest)
        of_a_pair = ((z - y) / (c - b) - (y - x) / (b - a)) / (c - a)
        return of_a_pair * (text_tokens + side**2 / multiple**2) ** 2

    def first(self, kept: int, count: int) -> int:
        """An upper bound of the bytes of weights in the first `kept` of `count` consecutive segments."""
        return min(self.weights, self.weights * kept // count + self.largest_block)

    def segment(self, count: int) -> int:
        """An upper bound of the bytes of weights in the largest of `count` consecutive segments."""
        return self.weights if count == 1 else min(self.weights, self.weights // count + self.largest_block)


def through(points: list[tuple[int, int]], x: float) -> float:
    """The value at `x` of the polynomial through all points (x, y), by Lagrange's formula."""
    total = 0.0
    for i, (xi, yi) in enumerate(points):
        term = float(yi)
        for j, (xj, _) in enumerate(points):
            if i != j:
                term *= (x - xj) / (xi - xj)
        total += term
    return total
