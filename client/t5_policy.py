"""Decides whether a prompt needs T5, for the option `t5: auto` and models that can do without T5.

Without T5, pictures look as good, but follow long prompts less closely, and letters come out wrong (Esser et al. 2024,
arXiv:2403.03206, section 5.3.3). Only CLIP then reads the prompt. It makes little use of the tokens after the first 20
or so (Zhang et al. 2024, arXiv:2403.15378), and it is weak at counting and at the places of things (Paiss et al. 2023,
arXiv:2302.12066; Yuksekgonul et al. 2023, arXiv:2210.01936). So T5 is left out only for short prompts that need none of
these abilities.
"""

from __future__ import annotations

import re

MAX_WORDS = 12  # nearly always fewer than 20 tokens of CLIP's

COUNTS = "two three four five six seven eight nine ten eleven twelve dozen pair couple several"
PLACES = """left right above below under underneath over behind between beside next near inside outside top bottom
front middle around through across against opposite facing holding wearing"""
LETTERS = """text word words letter letters says saying say reads reading written writing sign signs label labelled
labeled titled title caption logo poster slogan spelled spelling"""
TELLING = frozenset(f"{COUNTS} {PLACES} {LETTERS}".split())


def needs_t5(prompt: str) -> bool:
    """Whether T5 should read `prompt`, because it is not short and plain.

    This is so if it has more than MAX_WORDS words, more than one sentence, a digit, a quotation mark, a character that
    is not ASCII, or a word for a number (COUNTS), for the place of something (PLACES) or for lettering (LETTERS).
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    if len(words) > MAX_WORDS or not prompt.isascii() or re.search(r"[0-9\"`]|(^|\W)'|'(\W|$)", prompt):
        return True
    return bool(re.search(r"[.;:!?\n]\s*\S", prompt.strip()) or TELLING.intersection(words))
