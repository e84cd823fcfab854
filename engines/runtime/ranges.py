"""Which of the ranges of shapes that an engine was made for takes the shapes of a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ditforge.engines.compilers import Shape
from ditforge.errors import UserError

Range = Mapping[str, tuple[Shape, Shape]]  # the smallest and the largest shape of each input


def find_range(ranges: Sequence[Range], shapes: Mapping[str, Shape]) -> int:
    """The number of the first range that takes the shapes. Raises UserError if none does."""
    for number, bounds in enumerate(ranges):
        if all(within(shape, *bounds[name]) for name, shape in shapes.items()):
            return number
    taken = " or ".join(str({name: f"{low} to {high}" for name, (low, high) in r.items()}) for r in ranges)
    raise UserError(
        f"the engine was built for {taken}, got {shapes}",
        "ditforge build ONNX_DIR --gpu GPU --resolutions MIN-MAX --batch N --out DIR   for these too",
    )


def within(shape: Shape, smallest: Shape, largest: Shape) -> bool:
    """Whether a shape is in a range, in every dimension."""
    return len(shape) == len(smallest) and all(
        low <= size <= high for size, low, high in zip(shape, smallest, largest, strict=True)
    )
