"""How options are written in errors: for Python, or for the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditforge.errors import UserError
from ditforge.option import as_flags, as_keys, check_names, option, setting

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("made", "python", "flag"),
    [
        (option("true_cfg=4"), "true_cfg=4", "--true-cfg 4"),
        (option("true_cfg"), "true_cfg", "--true-cfg"),
        (option('tls=TLS(ca="FILE")', "--tls-ca FILE"), 'tls=TLS(ca="FILE")', "--tls-ca FILE"),
    ],
)
def test_an_option_reads_as_whoever_reads_it_writes_it(made: str, python: str, flag: str) -> None:
    """Also one that was made before it was known who that is."""
    assert (str(made), f"{made}; or", made + "!", UserError("no", made).fix) == (
        python,
        f"{python}; or",
        f"{python}!",
        python,
    )
    with as_flags():
        assert (str(made), f"{made}; or", made + "!", UserError("no", made).fix) == (
            flag,
            f"{flag}; or",
            f"{flag}!",
            flag,
        )
        error = UserError(f"{made} is wrong", f"leave {made} out")
    assert str(error) == f"{flag} is wrong\nfix:   leave {flag} out"
    assert str(made) == python


@pytest.mark.parametrize(
    ("value", "python", "flags"),
    [
        ("fp8", 'precision="fp8"', "--precision fp8"),
        (28, "precision=28", "--precision 28"),
        (True, "precision=True", "--precision"),
    ],
)
def test_an_option_with_a_value(value: object, python: str, flags: str) -> None:
    assert str(setting("precision", value)) == python
    with as_flags():
        assert str(setting("precision", value)) == flags


def test_a_value_is_quoted_for_a_shell() -> None:
    with as_flags():
        assert str(setting("out", "my folder/a.png")) == "--out 'my folder/a.png'"


def test_an_option_of_a_file() -> None:
    size = setting("size", "16:9")
    with as_flags(), as_keys(["size"]) as written:
        assert str(option("steps=3")) == "--steps 3"
        assert not written
        assert f"{option('size')}, {size}" == '"size", "size": "16:9"'
    assert written == {"size"}
    with as_flags(), as_keys(["size"], replaceable=True) as written:
        assert f"{option('size')}; {size}" == '"size"; --size 16:9'
    assert written == {"size"}
    assert str(size) == 'size="16:9"'


def test_names_that_there_are_not() -> None:
    check_names(["steps"], ["steps", "seed"])
    with pytest.raises(UserError, match=r"no option 'stepz'\nfix:   steps=…; the options are steps, seed"):
        check_names(["seed", "stepz"], ["steps", "seed"])
    with pytest.raises(UserError, match=r"no option 'cfg'\nfix:   guidance=…; the options are guidance"):
        check_names(["cfg"], ["guidance"], {"cfg": "guidance"})
    with pytest.raises(UserError, match=r"no option 'x'\nfix:   leave it out; the options are guidance"):
        check_names(["x"], ["guidance"])


def flags_in_errors(source: str) -> list[str]:
    """Texts in errors and constants that name a flag, but for whole commands and what option() makes."""

    def texts(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("option", "setting"):
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            for part in node.values:
                if isinstance(part, ast.FormattedValue):
                    yield from texts(part.value)
        else:
            for child in ast.iter_child_nodes(node):
                yield from texts(child)

    tree = ast.parse(source)
    errors = [node for node in tree.body if isinstance(node, ast.Assign)]  # fixes that several errors have
    errors += [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "DitforgeError")
    ]
    named = re.compile(r"(?<![\w(-])--[a-z]")
    return [text for error in errors for text in texts(error) if named.search(COMMAND.sub("", text))]


COMMAND_LINE = {  # modules that only the command line uses
    *("cli.py", "options.py", "picture_flags.py", "plan_report.py", "plan_subject.py", "reports.py", "verbosity.py")
}
COMMAND = re.compile(r"(ditforge|docker) [a-z].*")


def test_flags_that_would_be_found() -> None:
    assert flags_in_errors('raise UserError(f"no {x}", "leave out --lora")') == ["leave out --lora"]
    assert flags_in_errors('UserError(f"{y}", f"--lora {x}, or {z}")') == ["--lora {}, or {}"]
    assert flags_in_errors('FIX = "choose another --out"') == ["choose another --out"]
    assert not flags_in_errors("UserError(x, f\"{option('lora')}; or ditforge export X --lora {y}\")")


@pytest.mark.parametrize("room", ["export", "engines", "triton_repo", "client", "trunk"])
def test_errors_of_the_library_name_no_bare_flags(room: str) -> None:
    """Whoever calls it from Python has no flags. The command line alone uses what is left out here."""
    found = {
        path.relative_to(ROOT): flags
        for path in (ROOT / room).rglob("*.py")
        if path.parent.name != "commands"
        and path.name not in COMMAND_LINE
        and (flags := flags_in_errors(path.read_text()))
    }
    assert not found
