"""Makes text of files and servers harmless for a terminal."""

from __future__ import annotations

import re

# Control characters, with which a text could steer the terminal, and those that change the direction or the line.
STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    r"""The text with every character that could steer a terminal written as an escape, such as \x1b."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def plain_json(document: str) -> str:
    """The same JSON document without such characters: its strings have JSON's escapes in their place."""
    return STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", document)
