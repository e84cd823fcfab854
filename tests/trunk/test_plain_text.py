"""Text that cannot steer a terminal."""

from __future__ import annotations

import json

from hypothesis import given, strategies as st

from ditforge.plain_text import plain, plain_json


def test_what_is_escaped() -> None:
    assert plain("a\x1b]0;title\x07b\rc\x9b2J\u202ed") == r"a\x1b]0;title\x07b\rc\x9b2J\u202ed"


def test_what_is_kept() -> None:
    for text in ("two\nlines\tand a tab", "ein „Bär“", "赤い\u3000円", "👩\u200d🚀", r"C:\new"):
        assert plain(text) == text


@given(st.text())
def test_json_says_the_same(text: str) -> None:
    document = plain_json(json.dumps({"text": text}, indent=2, ensure_ascii=False))
    assert json.loads(document) == {"text": text}
    assert plain(document) == document
