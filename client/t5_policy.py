"""Whether a prompt needs T5: the policy of `t5: auto`, for models that T5 can be left out of.

Without T5, pictures look as good, but follow long prompts less closely, and letters come out wrong (Esser et al. 2024,
arXiv:2403.03206, section 5.3.3). CLIP, which is then alone, makes little of what is beyond some 20 tokens (Zhang et al.
2024, arXiv:2403.15378), and is weak at counting and at which thing stands where (Paiss et al. 2023, arXiv:2302.12066;
Yuksekgonul et al. 2023, arXiv:2210.01936). So T5 is left out of prompts that are short and ask for none of that.
"""

from __future__ import annotations

import re

MAX_WORDS = 12  # below 20 tokens of CLIP's in all but odd cases

COUNTS = "two three four five six seven eight nine ten eleven twelve dozen pair couple several"
PLACES = """left right above below under underneath over behind between beside next near inside outside top bottom
front middle around through across against opposite facing holding wearing"""
LETTERS = """text word words letter letters says saying say reads reading written writing sign signs label labelled
labeled titled title caption logo poster slogan spelled spelling"""
TELLING = frozenset(f"{COUNTS} {PLACES} {LETTERS}".split())


def needs_t5(prompt: str) -> bool:
    """Whether `prompt` is not short and plain.

    It needs T5 if it has more than MAX_WORDS words or more than one sentence, a digit, a quotation mark, letters beyond
    ASCII, or one of the words that tell of a number (COUNTS), of where things are (PLACES) or of lettering (LETTERS).
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    if len(words) > MAX_WORDS or not prompt.isascii() or re.search(r"[0-9\"`]|(^|\W)'|'(\W|$)", prompt):
        return True
    return bool(re.search(r"[.;:!?\n]\s*\S", prompt.strip()) or TELLING.intersection(words))
