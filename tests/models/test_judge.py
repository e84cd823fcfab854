"""The judge against fresh renderings: right scenes pass, wrong ones do not."""

import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from judge import judge
from numpy.typing import NDArray
from scenes import BACKGROUNDS, COLOURS, OPPOSITE, SHAPES, Scene, draw, sample_scene
from scipy import ndimage

Picture = NDArray[np.uint8]


@cache
def rendered(count: int = 500) -> list[tuple[Scene, Picture]]:
    rng = random.Random(42)
    scenes = [sample_scene(rng) for _ in range(count)]
    pictures = [
        (picture * 255).round().byte().permute(1, 2, 0).numpy()
        for start in range(0, count, 50)
        for picture in draw(scenes[start : start + 50], 128, 128, seed=start)
    ]
    return list(zip(scenes, pictures, strict=True))


def test_fewer_than_one_in_a_hundred_renderings_is_misjudged() -> None:
    wrong = [scene for scene, picture in rendered() if not judge(picture, scene).correct]
    assert len(wrong) < 0.01 * len(rendered()), wrong


def test_soft_edges_and_noise_are_forgiven() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for scene, picture in rendered()[:150]:
        soft = ndimage.gaussian_filter(picture.astype(float), (0.8, 0.8, 0)) + rng.normal(0, 5, picture.shape)
        wrong += not judge(soft.clip(0, 255).astype(np.uint8), scene).correct
    assert wrong <= 2


def test_a_picture_of_another_scene_fails() -> None:
    cases = rendered()
    for (scene, _), (other, picture) in zip(cases, cases[1:] + cases[:1], strict=True):
        assert scene == other or not judge(picture, scene).correct, (scene, other)


def changed(scene: Scene, attribute: str) -> Scene:
    """The scene with one attribute of its first object, the relation or the background made wrong."""
    first = scene.things[0]
    taken = {thing.colour for thing in scene.things} | {scene.background}
    if attribute == "colour":
        first = replace(first, colour=next(name for name in COLOURS if name not in taken))
    if attribute == "shape":
        first = replace(first, shape=next(name for name in SHAPES if name not in {t.shape for t in scene.things}))
    if attribute == "size":
        first = replace(first, size="small" if first.size == "large" else "large")
    background = (
        next(name for name in BACKGROUNDS if name not in taken) if attribute == "background" else scene.background
    )
    relation = OPPOSITE[scene.relation] if attribute == "relation" and scene.relation else scene.relation
    return Scene((first, *scene.things[1:]), relation, background)


@pytest.mark.parametrize("attribute", ["colour", "shape", "size", "relation", "background"])
def test_one_wrong_attribute_fails_and_is_named(attribute: str) -> None:
    for scene, picture in rendered()[:150]:
        if len(scene.things) < 2:
            continue
        verdict = judge(picture, changed(scene, attribute))
        assert not verdict.correct
        # Objects alike in colour or shape may be taken for each other, and then another attribute is named.
        if len({t.colour for t in scene.things}) == len({t.shape for t in scene.things}) == 2:
            assert not getattr(verdict, attribute), (scene, verdict)


def test_a_missing_or_an_extra_object_fails() -> None:
    scene, picture = next(case for case in rendered() if len(case[0].things) == 2)
    assert not judge(picture, Scene(scene.things[:1], None, scene.background)).count
    one, lonely = next(case for case in rendered() if len(case[0].things) == 1)
    spotted = lonely.copy()
    ground = BACKGROUNDS[one.background or "white"]
    spot = (255, 255, 255) if sum(ground) < 380 else (0, 0, 0)
    clear = np.argwhere(ndimage.minimum_filter((lonely == ground).all(2), 13))
    y, x = clear[len(clear) // 2]
    spotted[y - 4 : y + 4, x - 4 : x + 4] = spot
    assert judge(lonely, one).correct and not judge(spotted, one).correct


def test_another_kind_of_array_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        judge(np.zeros((128, 128, 3), dtype=np.float32), "a red circle")
