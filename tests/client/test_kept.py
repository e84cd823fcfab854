"""What servers have kept of a picture's inputs, as the client remembers it."""

from __future__ import annotations

import numpy as np

from ditforge.client.kept import MOST_LOST, KeptInputs

NAMES = ("prompt_embeds", "pooled_embeds")


def inputs(seed: int) -> dict[str, np.ndarray]:
    return {name: np.full((1, 4), seed, np.float32) for name in (*NAMES, "latents")}


def test_the_same_arrays_have_the_same_label() -> None:
    kept, first = KeptInputs(), inputs(0)
    label = kept.label(first, NAMES)
    assert kept.label({**first, "latents": np.ones(3)}, NAMES) == label
    assert kept.label(inputs(0), NAMES) != label
    assert KeptInputs().label(first, NAMES) != label  # of another picture, and nobody can guess it


def test_arrays_that_are_gone_lend_their_label_to_no_others() -> None:
    kept = KeptInputs()
    labels = [kept.label(inputs(seed), NAMES) for seed in range(100)]  # each could get the memory of the one before
    assert len(set(labels)) == 100


def test_an_address_that_loses_what_it_kept_gets_everything() -> None:
    kept = KeptInputs()
    for _ in range(MOST_LOST):
        kept.sent("a", "label")
        kept.sent("b", "label")
        assert kept.has("a", "label") and kept.has("b", "label")
        kept.lost("a", "label")
        assert not kept.has("a", "label") and kept.has("b", "label")
    kept.sent("a", "label")
    assert not kept.has("a", "label") and kept.has("b", "label")
