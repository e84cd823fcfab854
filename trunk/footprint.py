"""What a network takes of a device's memory: measured by `export`, from which `plan` and `build` reckon."""

from __future__ import annotations

from itertools import pairwise

from pydantic import BaseModel, ConfigDict, Field


class Footprint(BaseModel):
    """Bytes of a network: of its `weights`, and of its `activations` for one sample, by the picture's side in pixels.

    `largest_block` is the weights of that block which is the largest: no cut between blocks makes it smaller.
    Activations are those that live at the same time, at worst. `flops` are the floating point operations for one
    sample, by the same sides; empty where nobody counted them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: int
    largest_block: int
    activations: dict[int, int] = Field(min_length=1)
    flops: dict[int, int] = {}

    def activations_at(self, side: float) -> int:
        """Bytes of activations for one picture of side x side pixels (or as many).

        They grow with the pixels, or faster (attention without a fused kernel: with their square), so that straight
        lines between what was measured are never too low; beyond it, a parabola through the last three goes on.
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
        """Floating point operations for one picture of side x side pixels (or as many); None where nobody counted them.

        They grow with the pixels, and those of attention with their square: a parabola through the nearest three.
        """
        points = sorted((size**2, count) for size, count in self.flops.items())
        if not points:
            return None
        nearest = sorted(points, key=lambda point: abs(point[0] - side**2))[:3]
        return through(sorted(nearest), side**2)

    def first(self, kept: int, count: int) -> int:
        """Bytes of weights of the first `kept` of `count` consecutive segments, at most."""
        return min(self.weights, self.weights * kept // count + self.largest_block)

    def segment(self, count: int) -> int:
        """Bytes of weights of the largest of `count` consecutive segments, at most."""
        return self.weights if count == 1 else min(self.weights, self.weights // count + self.largest_block)


def through(points: list[tuple[int, int]], x: float) -> float:
    """The polynomial through all points, at x (Lagrange)."""
    total = 0.0
    for i, (xi, yi) in enumerate(points):
        term = float(yi)
        for j, (xj, _) in enumerate(points):
            if i != j:
                term *= (x - xj) / (xi - xj)
        total += term
    return total
