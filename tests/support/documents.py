"""What is in the repository's documents: fenced blocks, and commands between backquotes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from ditforge.cli import app

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
DOCUMENTS = [README, CONTRIBUTING, *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
FENCE = re.compile(
    r"^(?:<!-- test: (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
SPAN = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block. mark: what the comment above it, <!-- test: MARK -->, says of it; line: of its fence, from 1."""

    document: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document, in order."""
    text, found = document.read_text(), []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("language")) + 1
        found.append(Block(document, line, match["language"], match["mark"] or "", match["text"]))
    return found


def commands(block: Block) -> Iterator[list[str]]:
    """The commands of a shell block, each as its words, without comments and what joins or ends commands."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for joined, words in groupby(lexer, key=lambda word: not set(word) - set("&;()|")):
            if not joined:
                yield list(words)


def spans(document: Path) -> Iterator[list[str]]:
    """The commands of ditforge between backquotes, each as its words, but for those with something left out."""
    for span in SPAN.findall(FENCE.sub("", document.read_text())):
        text = " ".join(span.split())
        if text.startswith("ditforge ") and "…" not in text:
            words = shlex.split(text)
            if len(words) > 2:
                yield words


def parse(words: list[str]) -> dict[str, Any]:
    """The values that typer reads from a command of ditforge. Raises an error of its own for an unknown option."""
    program, name, *arguments = words
    assert program == "ditforge", words
    command = COMMANDS[name]
    values, _, _ = command.make_parser(command.context_class(command)).parse_args(list(arguments))
    return dict(values)
