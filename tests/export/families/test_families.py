"""The wall around export/: nothing outside it knows which family it serves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ditforge
from ditforge import client, engines, export, triton_repo

FAMILY = re.compile(r"flux|sd3|sd_3|stable.?diffusion|schnell|turbo", re.IGNORECASE)
ROOMS = {module.__name__: Path(module.__path__[0]) for module in (client, engines, triton_repo, ditforge)}


def said(tree: ast.Module) -> list[str]:
    """Every name, attribute and string of a module, but for docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented)
                  and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    words: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.append(node.value)
        words += [
            value
            for key in ("id", "attr", "name", "arg", "module")
            if isinstance(value := getattr(node, key, None), str)
        ]
    return words


@pytest.mark.parametrize("room", ROOMS)
def test_no_code_outside_export_names_a_family(room: str) -> None:
    files = sorted(ROOMS[room].rglob("*.py"))
    assert files
    named = {str(f): [word for word in said(ast.parse(f.read_text())) if FAMILY.search(word)] for f in files}
    assert {name: words for name, words in named.items() if words} == {}


def test_the_search_finds_them() -> None:
    folder = Path(export.__path__[0])
    assert any(FAMILY.search(word) for word in said(ast.parse((folder / "families" / "flux.py").read_text())))
    tree = ast.parse('"""About flux."""\nif model.name == "flux": pass')
    assert [word for word in said(tree) if FAMILY.search(word)] == ["flux"]
