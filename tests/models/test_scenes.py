"""Captions, their reading back, what is held out, and the renderer's geometry."""

import random

import pytest
import torch
from scenes import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT,
    RELATIONS,
    SHAPES,
    Scene,
    Thing,
    caption,
    combinations,
    draw,
    held_out_captions,
    parse_caption,
    training_scenes,
)


def test_captions_read_back_as_the_scene_they_were_written_from() -> None:
    rng = random.Random(3)
    scenes = training_scenes(5000, seed=3)
    assert all(parse_caption(caption(scene, rng)) == scene for scene in scenes)


def test_training_never_shows_a_held_out_combination() -> None:
    assert len(HELD_OUT) == round(len(COLOURS) * len(SHAPES) * len(RELATIONS) / 10)
    rng = random.Random(11)
    for scene in training_scenes(50_000, seed=11):
        read = parse_caption(caption(scene, rng))
        assert HELD_OUT.isdisjoint(combinations(read)), read


def test_held_out_captions_each_show_one_and_name_everything() -> None:
    for text in held_out_captions(500, seed=1):
        scene = parse_caption(text)
        assert not HELD_OUT.isdisjoint(combinations(scene))
        assert scene.background and all(thing.size for thing in scene.things)


def test_the_same_seed_gives_the_same_captions() -> None:
    assert held_out_captions(20, seed=5) == held_out_captions(20, seed=5)
    assert held_out_captions(20, seed=5) != held_out_captions(20, seed=6)


def test_a_caption_outside_the_grammar_is_refused() -> None:
    with pytest.raises(ValueError, match="not a caption of this grammar"):
        parse_caption("a photograph of a cat")


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (160, 96)])
def test_a_picture_has_its_size_background_and_object_colour(size: tuple[int, int]) -> None:
    scene = Scene((Thing("red", "circle", "large"),), None, "grey")
    picture = draw([scene], *size, seed=0)[0]
    assert picture.shape == (3, *size)
    flat = (picture * 255).round().flatten(1).T
    for colour in (BACKGROUNDS["grey"], COLOURS["red"]):
        assert (flat == torch.tensor(colour)).all(1).any()
    assert torch.equal(flat[0], torch.tensor(BACKGROUNDS["grey"]).float())
