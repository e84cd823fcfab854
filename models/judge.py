"""Does a picture show what its caption asks for? Classical vision only; nothing here is learned.

Background from the border, objects as connected components, colours by the nearest name of the palette, shapes and
sizes by the overlap with ideal outlines, the relation from the centres. A picture that shows anything else, or
anything more, fails.
"""

from dataclasses import dataclass
from functools import cache
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scenes import BACKGROUNDS, CIRCLE_RADIUS, COLOURS, RGB, SHAPES, SIZES, Scene, Thing, parse_caption
from scipy import ndimage

Floats = NDArray[np.float64]

FOREGROUND = 45  # RGB distance from the background; the palette's nearest two colours are 94 apart
NEAREST = 47  # a colour farther than this from every name has no name
SPECK = 0.0012  # components below this share of the picture are noise; the smallest object covers 0.02
OVERLAP = 0.78  # least overlap (intersection over union) with an ideal outline
TOLERANCE = 0.017  # radius outside a size's range that still counts, as a share of the shorter side
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Seen:
    """One object as found: `thing` holds names or "unknown"; centre x, y and radius in pixels; overlap in 0..1."""

    thing: Thing
    centre: tuple[float, float]
    radius: float
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """What was right. An attribute that the caption leaves open is right; with a wrong count, so are no others."""

    count: bool
    background: bool
    colour: bool
    shape: bool
    size: bool
    relation: bool
    seen: Scene

    @property
    def correct(self) -> bool:
        """True if the picture shows exactly what the caption asks for."""
        return all((self.count, self.background, self.colour, self.shape, self.size, self.relation))


@cache
def _ideal(shape: str) -> tuple[float, tuple[float, float]]:
    """Area and centroid of a shape of radius 1 (the shoelace formula)."""
    if shape == "circle":
        return np.pi * CIRCLE_RADIUS**2, (0.0, 0.0)
    x, y = np.array(SHAPES[shape]).T
    x1, y1 = np.roll(x, -1), np.roll(y, -1)
    cross = x * y1 - x1 * y
    area = cross.sum() / 2
    return abs(area), (((x + x1) * cross).sum() / (6 * area), ((y + y1) * cross).sum() / (6 * area))


def _inside(shape: str, x: Floats, y: Floats) -> NDArray[np.bool_]:
    """Which points lie in a shape of radius 1: crossings of a ray to the right are odd."""
    if shape == "circle":
        return x * x + y * y <= CIRCLE_RADIUS**2
    odd = np.zeros(np.broadcast(x, y).shape, dtype=bool)
    vertices = SHAPES[shape]
    for (x0, y0), (x1, y1) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        if y0 != y1:
            odd ^= ((y0 <= y) != (y1 <= y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return odd


def _name(colour: Floats, palette: dict[str, RGB]) -> str:
    distance = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in palette.items()}
    nearest = min(distance, key=distance.__getitem__)
    return nearest if distance[nearest] <= NEAREST else UNKNOWN


def _fit(coverage: Floats, shape: str) -> tuple[float, float]:
    """(overlap, radius in pixels) of the outline that has the area and centroid of `coverage` [H, W] in 0..1."""
    area, (cx, cy) = _ideal(shape)
    mass = coverage.sum()
    radius = float(np.sqrt(mass / area))
    rows, columns = np.arange(coverage.shape[0]) + 0.5, np.arange(coverage.shape[1]) + 0.5
    x0 = (coverage.sum(0) @ columns) / mass - radius * cx
    y0 = (coverage.sum(1) @ rows) / mass - radius * cy
    offsets = np.array([-0.25, 0.25])
    x = ((columns[:, None] + offsets).ravel() - x0) / radius
    y = ((rows[:, None] + offsets).ravel() - y0) / radius
    inside = _inside(shape, x[None, :], y[:, None])
    ideal = inside.reshape(len(rows), 2, len(columns), 2).mean((1, 3))
    return float(np.minimum(coverage, ideal).sum() / np.maximum(coverage, ideal).sum()), radius


def _size(share: float) -> str:
    for name, (low, high) in SIZES.items():
        if low - TOLERANCE <= share <= high + TOLERANCE:
            return name
    return UNKNOWN


def _object(pixels: Floats, component: NDArray[np.bool_], ground: Floats) -> Seen:
    core = ndimage.binary_erosion(component, iterations=2)
    colour = np.median(pixels[core if core.any() else component], axis=0)
    reach = ndimage.binary_dilation(component, iterations=2)
    ys, xs = np.nonzero(reach)
    window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    # Coverage along the line from the background's colour to the object's, so that soft edges count by their share.
    step = colour - ground
    coverage = np.clip((pixels[window] - ground) @ step / (step @ step), 0, 1) * reach[window]
    coverage[coverage < 0.1] = 0  # the background's noise
    fits = {shape: _fit(coverage, shape) for shape in SHAPES}
    shape = max(fits, key=lambda name: fits[name][0])
    overlap, radius = fits[shape]
    mass = coverage.sum()
    x = float(coverage.sum(0) @ np.arange(coverage.shape[1]) / mass) + xs.min() + 0.5
    y = float(coverage.sum(1) @ np.arange(coverage.shape[0]) / mass) + ys.min() + 0.5
    size = _size(radius / min(pixels.shape[:2]))
    thing = Thing(_name(colour, COLOURS), shape if overlap >= OVERLAP else UNKNOWN, size)
    return Seen(thing, (x, y), radius, overlap)


def look(image: Image.Image | ArrayLike) -> tuple[str, list[Seen]]:
    """(name of the background, objects) of a picture: PIL, or uint8 [H, W, 3].

    Raises ValueError for an array of another shape or dtype.
    """
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"a picture is uint8 [H, W, 3], not {array.dtype} {list(array.shape)}")
    pixels = array.astype(np.float64)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, 0], pixels[:, -1]])
    ground = np.median(border, axis=0)
    labels, _ = ndimage.label(np.linalg.norm(pixels - ground, axis=2) > FOREGROUND, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    found = [label for label in range(1, len(areas)) if areas[label] >= SPECK * labels.size]
    return _name(ground, BACKGROUNDS), [_object(pixels, labels == label, ground) for label in found]


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = (b - a for a, b in zip(first.centre, second.centre, strict=True))
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def judge(image: Image.Image | ArrayLike, wanted: str | Scene) -> Verdict:
    """Compares a picture (PIL, or uint8 [H, W, 3]) with a caption of the grammar of `scenes`, or with a scene.

    Which found object is which wanted one is chosen in the caption's favour. Raises ValueError for a caption outside
    the grammar.
    """
    scene = parse_caption(wanted) if isinstance(wanted, str) else wanted
    ground, objects = look(image)
    background = scene.background in (None, ground)
    verdicts = []
    for order in permutations(objects) if len(objects) == len(scene.things) else ():
        relation = _relation(*order) if len(order) == 2 else None
        pairs = list(zip(order, scene.things, strict=True))
        verdicts.append(
            Verdict(
                count=True,
                background=background,
                colour=all(seen.thing.colour == thing.colour for seen, thing in pairs),
                shape=all(seen.thing.shape == thing.shape for seen, thing in pairs),
                size=all(thing.size in (None, seen.thing.size) for seen, thing in pairs),
                relation=relation == scene.relation,
                seen=Scene(tuple(seen.thing for seen in order), relation, ground),
            )
        )
    if not verdicts:
        seen = Scene(tuple(item.thing for item in objects), None, ground)
        return Verdict(False, background, False, False, False, False, seen)
    return max(verdicts, key=lambda v: v.colour + v.shape + v.size + v.relation)
