"""Prints the report of a command, which is a frozen dataclass, as text for people or, with --json, as a JSON document.

The keys of the document are the fields of the dataclass; docs/json.md lists them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from ditforge import terminal
from ditforge.plain_text import plain_json

R = TypeVar("R")

JSON_HELP = "Print one JSON document on standard output instead of text; docs/json.md lists its keys."
Json = Annotated[bool, typer.Option("--json", help=JSON_HELP)]


def show(report: R, say: Callable[[R], None], as_json: bool) -> None:
    """Print a report as JSON, or have `say` print it as text."""
    if as_json:
        terminal.say(as_document(report))
    else:
        say(report)


def as_document(report: Any) -> str:
    """A dataclass as an indented JSON object. Numbers that are not finite, which JSON lacks, become null.

    Characters that could steer a terminal are escaped.
    """
    document = json.dumps(_finite(dataclasses.asdict(report)), indent=2, allow_nan=False, ensure_ascii=False)
    return plain_json(document)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
