"""The tables of docs/checkpoints.md are those of tests/support/checkpoint_tables.py, and every test in them exists."""

from __future__ import annotations

import ast

import checkpoint_tables
import pytest

COMMAND = ".venv/bin/python tests/support/checkpoint_tables.py"


def test_the_document_has_the_tables() -> None:
    text = checkpoint_tables.DOCUMENT.read_text()
    named = [match["name"] for match in checkpoint_tables.MARKED.finditer(text)]
    assert named == list(checkpoint_tables.TABLES), "docs/checkpoints.md has other tables than checkpoint_tables.py"
    assert checkpoint_tables.renewed(text) == text, f"write the tables anew: {COMMAND}"


@pytest.mark.parametrize("test", sorted(set(checkpoint_tables.all_tests())))
def test_every_test_exists(test: str) -> None:
    file, name = checkpoint_tables.place(test)
    functions = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert name in functions
