"""Captioned scenes of one or two flat shapes: the grammar of the captions and the renderer of the pictures.

A scene names what a picture must show; `caption` puts it into words, `parse_caption` reads the words back, and `draw`
renders it with signed distance functions on any device. A tenth of the (colour, shape, relation) combinations never
occurs in a training scene, so that a model can be asked for something it has not seen. Only what draws needs torch.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RGB = tuple[int, int, int]
COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "cyan": (60, 205, 230),
    "blue": (40, 70, 215),
    "purple": (135, 50, 175),
    "pink": (250, 140, 195),
}
BACKGROUNDS: dict[str, RGB] = {"white": (250, 250, 250), "grey": (140, 140, 140), "black": (20, 20, 20), **COLOURS}

# Outlines in units of the object's radius, x to the right and y down, each inside the square [-1, 1]^2. Their areas
# are alike enough that the eye reads the same radius as the same size.
CIRCLE_RADIUS = 0.95
_STAR = [
    (rho * math.sin(k * math.pi / 5), 0.1 - rho * math.cos(k * math.pi / 5)) for k, rho in enumerate([1.1, 0.5] * 5)
]
SHAPES: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "diamond": [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)],
    "cross": [
        (-0.36, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36), (1.0, 0.36), (0.36, 0.36),
        (0.36, 1.0), (-0.36, 1.0), (-0.36, 0.36), (-1.0, 0.36), (-1.0, -0.36), (-0.36, -0.36),
    ],
    "star": _STAR,
}  # fmt: skip

# Radius as a share of the picture's shorter side: lowest and highest.
SIZES: dict[str, tuple[float, float]] = {"small": (0.095, 0.115), "large": (0.175, 0.205)}
MARGIN, GAP = 0.025, 0.06  # least distance to the edge, and between two objects; shares of the shorter side

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)

_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
}


@dataclass(frozen=True)
class Thing:
    """One object. `size` None: the caption leaves it open."""

    colour: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """What a picture shows: `things[0]` is `relation` `things[1]`. `background` None: the caption leaves it open."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None


def combinations(scene: Scene) -> set[tuple[str, str, str]]:
    """Every (colour, shape, relation) that the picture shows, seen from either object; empty for a single object."""
    if scene.relation is None:
        return set()
    first, second = scene.things
    return {(first.colour, first.shape, scene.relation), (second.colour, second.shape, OPPOSITE[scene.relation])}


def _lowest_tenth(names: list[tuple[str, str, str]]) -> frozenset[tuple[str, str, str]]:
    ranked = sorted(names, key=lambda name: hashlib.sha256(" ".join(name).encode()).digest())
    return frozenset(ranked[: round(len(ranked) / 10)])


HELD_OUT = _lowest_tenth(list(product(COLOURS, SHAPES, RELATIONS)))


def is_held_out(scene: Scene) -> bool:
    """True if the scene shows a combination that no training scene shows."""
    return not HELD_OUT.isdisjoint(combinations(scene))


def sample_scene(rng: random.Random) -> Scene:
    """A scene drawn from all scenes, held out or not: one object in a quarter of them, everything named."""
    background = rng.choice(list(BACKGROUNDS))
    colours = [colour for colour in COLOURS if colour != background]
    names = list(product(colours, SHAPES))
    chosen = rng.sample(names, 1 if rng.random() < 0.25 else 2)
    things = tuple(Thing(colour, shape, rng.choice(list(SIZES))) for colour, shape in chosen)
    return Scene(things, rng.choice(RELATIONS) if len(things) == 2 else None, background)


def training_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes without any held-out combination; a twelfth leaves the sizes open, a twelfth the background."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if is_held_out(scene):
            continue
        if rng.random() < 1 / 12:
            scene = Scene(tuple(Thing(t.colour, t.shape, None) for t in scene.things), scene.relation, scene.background)
        if rng.random() < 1 / 12:
            scene = Scene(scene.things, scene.relation, None)
        scenes.append(scene)
    return scenes


def held_out_captions(count: int, seed: int) -> list[str]:
    """`count` captions of two objects, each with at least one combination of `HELD_OUT`, everything named."""
    rng, wording = random.Random(seed), random.Random(f"wording {seed}")
    scenes = filter(is_held_out, iter(lambda: sample_scene(rng), None))
    return [caption(scene, wording) for scene in islice(scenes, count)]


def caption(scene: Scene, rng: random.Random) -> str:
    """The scene in English, e.g. "a large red circle above a small blue square on a white background".

    The wording varies: articles, synonyms of the sizes and relations, how the background is named, a capital, a full
    stop.
    """
    article = rng.random() < 0.75
    phrases = []
    for thing in scene.things:
        words = [rng.choice(_SIZE_WORDS[thing.size])] if thing.size else []
        words += [thing.colour, thing.shape]
        determiner = ["an" if words[0][0] in "aeiou" else "a"] if article else []
        phrases.append(" ".join(determiner + words))
    text = phrases[0]
    if scene.relation:
        text = f"{text} {rng.choice(_RELATION_WORDS[scene.relation])} {phrases[1]}"
    if scene.background is not None:
        tone = rng.choice(("grey", "gray")) if scene.background == "grey" else scene.background
        an = "an" if tone[0] in "aeiou" else "a"
        usual = f"{text} on {an} {tone} background"
        others = (
            f"{text}, {tone} background",
            f"{text} against {an} {tone} background",
            f"on {an} {tone} background, {text}",
            f"{text} on {tone}",
        )
        text = rng.choice((usual, usual, usual, *others))
    if rng.random() < 0.25:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


_COLOUR = "|".join([*COLOURS, "white", "grey", "gray", "black"])
_SIZE = "|".join(sorted({word for words in _SIZE_WORDS.values() for word in words}))
_THING = re.compile(rf"\b(?:({_SIZE}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_GROUND = re.compile(rf"\b({_COLOUR}) background\b|\bon ({_COLOUR})$")
_RELATION = re.compile(r"\b(left of|right of|above|over|below|under)\b")


def parse_caption(text: str) -> Scene:
    """The scene that a caption of this grammar asks for: the inverse of `caption`.

    Raises ValueError where the text names no object, more than two, or two without a relation.
    """
    text = text.lower().strip(" .")
    sizes = {word: size for size, words in _SIZE_WORDS.items() for word in words}
    things = tuple(Thing(colour, shape, sizes.get(size)) for size, colour, shape in _THING.findall(text))
    ground, relation = _GROUND.search(text), _RELATION.search(text)
    background = (ground[1] or ground[2]).replace("gray", "grey") if ground else None
    synonyms = {word: name for name, words in _RELATION_WORDS.items() for word in words}
    if not 1 <= len(things) <= 2 or (len(things) == 2) != (relation is not None):
        raise ValueError(f"not a caption of this grammar: {text!r} (it names one object, or two with a relation)")
    return Scene(things, synonyms[relation[1]] if relation else None, background)


@dataclass(frozen=True)
class Layout:
    """A batch of placed scenes. Lengths in pixels, colours in 0..1; an absent second object has radius 0."""

    shape: torch.Tensor  # [B, 2] int64, index into SHAPES
    centre: torch.Tensor  # [B, 2, 2] float32, x and y
    radius: torch.Tensor  # [B, 2] float32
    colour: torch.Tensor  # [B, 2, 3] float32
    background: torch.Tensor  # [B, 3] float32


def place(scenes: Sequence[Scene], height: int, width: int, rng: random.Random) -> Layout:
    """Positions and radii at random within what each scene says; what a caption left open is drawn here.

    The distance along the relation's axis is at least twice that across it, so that no relation is in doubt.
    """
    import torch

    shapes, colours, grounds, radii, axes = [], [], [], [], []
    for scene in scenes:
        taken = {thing.colour for thing in scene.things}
        ground = scene.background or rng.choice([name for name in BACKGROUNDS if name not in taken])
        grounds.append(BACKGROUNDS[ground])
        things = [*scene.things, *scene.things][:2]
        shapes.append([list(SHAPES).index(thing.shape) for thing in things])
        colours.append([COLOURS[thing.colour] for thing in things])
        radius = [rng.uniform(*SIZES[thing.size or rng.choice(list(SIZES))]) for thing in things]
        radii.append(radius if scene.relation else [radius[0], 0.0])
        axes.append((scene.relation in ("above", "below"), scene.relation in ("right of", "below")))
    side = min(height, width)
    radius = torch.tensor(radii) * side
    vertical, second_first = torch.tensor(axes).T[:, :, None]
    ordered = torch.where(second_first, radius.flip(1), radius)
    along = torch.where(vertical, height, width).float()
    across = torch.where(vertical, width, height).float()
    u = torch.tensor([[rng.random() for _ in range(4)] for _ in scenes])
    split = u[:, :2].sort(1).values
    single = radius[:, 1:] == 0
    slack = along - 2 * MARGIN * side - 2 * radius.sum(1, keepdim=True) - torch.where(single, 0.0, GAP * side)
    low = MARGIN * side + ordered[:, :1] + torch.where(single, u[:, :1], split[:, :1]) * slack
    high = low + ordered.sum(1, keepdim=True) + GAP * side + (split[:, 1:] - split[:, :1]) * slack
    edge = MARGIN * side + ordered
    p_low = edge[:, :1] + u[:, 2:3] * (across - 2 * edge[:, :1])
    p_high = p_low + (u[:, 3:] - 0.5) * (high - low)
    p_high = p_high.maximum(edge[:, 1:]).minimum(across - edge[:, 1:])
    position = torch.cat([low, high], 1), torch.cat([p_low, p_high], 1)
    main, cross = (torch.where(second_first, p.flip(1), p) for p in position)
    centre = torch.stack([torch.where(vertical, cross, main), torch.where(vertical, main, cross)], 2)
    return Layout(
        torch.tensor(shapes),
        centre,
        radius,
        torch.tensor(colours) / 255,
        torch.tensor(grounds, dtype=torch.float32) / 255,
    )


def outline_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Signed distance of the points to a shape's outline, negative inside, all in units of its radius.

    The polygon's is Inigo Quilez' "Polygon - exact" (2D distance functions), with an even-odd crossing count.
    """
    import torch

    if shape == "circle":
        return torch.hypot(x, y) - CIRCLE_RADIUS
    vertices = SHAPES[shape]
    squared = torch.full_like(x, torch.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    for (x0, y0), (x1, y1) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        ex, ey, wx, wy = x1 - x0, y1 - y0, x - x0, y - y0
        t = ((wx * ex + wy * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        squared = torch.minimum(squared, (wx - ex * t).square() + (wy - ey * t).square())
        if ey != 0:
            inside ^= ((y >= y0) != (y >= y1)) & (wx < wy * (ex / ey))
    return torch.where(inside, -squared.sqrt(), squared.sqrt())


def render(layout: Layout, height: int, width: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Pictures [B, 3, height, width] float32 in 0..1, edges anti-aliased over one pixel."""
    import torch

    names = list(SHAPES)
    centre, radius, colour = (t.to(device) for t in (layout.centre, layout.radius, layout.colour))
    ys = torch.arange(height, device=device)[:, None] + 0.5
    xs = torch.arange(width, device=device) + 0.5
    picture = layout.background.to(device)[:, :, None, None].expand(-1, -1, height, width).clone()
    for slot in range(2):
        present = layout.radius[:, slot] > 0
        for index, name in enumerate(names):
            rows = (present & (layout.shape[:, slot] == index)).nonzero()[:, 0].to(device)
            if len(rows) == 0:
                continue
            r = radius[rows, slot, None, None]
            x = (xs - centre[rows, slot, 0, None, None]) / r
            y = (ys - centre[rows, slot, 1, None, None]) / r
            distance = outline_distance(name, *torch.broadcast_tensors(x, y)) * r
            coverage = (0.5 - distance).clamp(0, 1)[:, None]
            picture[rows] = torch.lerp(picture[rows], colour[rows, slot, :, None, None], coverage)
    return picture


def draw(
    scenes: Sequence[Scene], height: int, width: int, seed: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The scenes placed at random by `seed` and rendered: [B, 3, height, width] float32 in 0..1."""
    return render(place(scenes, height, width, random.Random(seed)), height, width, device)
