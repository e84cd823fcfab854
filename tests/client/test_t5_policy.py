"""The policy of `t5: auto`: short and plain prompts do without T5."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from ditforge.client.t5_policy import COUNTS, LETTERS, MAX_WORDS, PLACES, needs_t5

PLAIN = [
    "",
    "a",
    "a large red circle",
    "A photograph of a lighthouse at night.",
    "portrait of an old woman, oil painting, soft light",
    "the sailor's dog",
    "an astronaut riding a horse on mars, digital art, sharp focus",
]
NOT_PLAIN = [
    'a shop window that shows "open"',
    "a shop window that shows 'open'",
    "a shop window that shows “open”",
    "3 cats",
    "three cats",
    "a red circle above a blue square",
    "a cat to the left of a dog",
    "a street sign",
    "a cat. It is asleep",
    "a cat\nasleep",
    "first a cat; then a dog",
    "eine Straße",
    "一只猫",
    "a b c d e f g h i j k l m",
]


@pytest.mark.parametrize("prompt", PLAIN)
def test_plain(prompt: str) -> None:
    assert not needs_t5(prompt)


@pytest.mark.parametrize("prompt", NOT_PLAIN)
def test_not_plain(prompt: str) -> None:
    assert needs_t5(prompt)


@pytest.mark.parametrize("word", f"{COUNTS} {PLACES} {LETTERS}".split())
def test_words_that_tell(word: str) -> None:
    assert needs_t5(f"a cat {word} a dog")
    assert needs_t5(word.upper())
    assert not needs_t5(f"a cat x{word}x a dog")


@given(st.lists(st.sampled_from(["cat", "red", "of", "a", "painting"]), max_size=30))
def test_length_alone_decides(words: list[str]) -> None:
    assert needs_t5(" ".join(words)) == (len(words) > MAX_WORDS)


@given(st.text())
def test_any_text(prompt: str) -> None:
    assert needs_t5(prompt) in (True, False)
