"""How options are written in errors: for Python, or for the command line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ditforge.errors import UserError
from ditforge.option import as_flags, as_keys, check_names, command, option, renamed, setting

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
        ("my file", 'precision="my file"', "--precision 'my file'"),
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


def test_a_command_that_runs_others_has_its_own_flags() -> None:
    out = option("choose another out, or remove it first", "choose another --out, or remove it first")
    with as_flags(), renamed({"--out": "--cache", "--batch": "--max-batch"}):
        assert f"{setting('batch', 2)}; {option('max_batch')}; {out}" == (
            "--max-batch 2; --max-batch; choose another --cache, or remove it first"
        )
        assert command("ditforge build {} --out DIR", "onnx") == "ditforge build onnx --out DIR"
    with renamed({"--out": "--cache"}):
        assert str(setting("out", "a")) == 'out="a"'
    with as_flags():
        assert str(setting("out", "a")) == "--out a"


def test_a_command_is_quoted_for_a_shell() -> None:
    assert command("ditforge build {} --gpu {} --out DIR", Path("my folder"), "cpu") == (
        "ditforge build 'my folder' --gpu cpu --out DIR"
    )
    assert command("ditforge verify {}", "a{b}'c") == """ditforge verify 'a{b}'"'"'c'"""


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
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("option", "setting", "command"):
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


COMMANDS = "bench|build|calibrate|export|generate|inspect|plan|repo|serve|up|verify"
# A value in a command, up to the spaces that end it, or behind a flag.
UNQUOTED = re.compile(rf"ditforge (?:{COMMANDS})\b(?:(?!   |, |; )[^{{])*{{}}|--[a-z][a-z-]* {{}}")


def unquoted_values(source: str) -> list[str]:
    """Texts with a command or a flag whose value a shell may read as something else.

    command(), quote() and the formatting of a number make a value that it does not.
    """

    def is_safe(part: ast.FormattedValue) -> bool:
        name = part.value.func.id if isinstance(part.value, ast.Call) and isinstance(part.value.func, ast.Name) else ""
        return part.format_spec is not None or name in ("quote", "command", "setting", "option")

    def text(node: ast.JoinedStr) -> str:
        parts = [
            part.value if isinstance(part, ast.Constant) else "" if is_safe(part) else "{}"  # type: ignore[arg-type]
            for part in node.values
        ]
        return "".join(map(str, parts))

    texts = [text(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr)]
    return [each for each in texts if UNQUOTED.search(each)]


def test_values_that_would_be_found() -> None:
    assert unquoted_values('f"ditforge build {folder} --out DIR"') == ["ditforge build {} --out DIR"]
    assert unquoted_values('f"choose --out {folder}"') == ["choose --out {}"]
    assert not unquoted_values('f"ditforge build DIR   on a machine with {gpu}"')
    assert not unquoted_values('f"--out {quote(folder)} --grace {seconds:g}, or {command(form, folder)}"')


@pytest.mark.parametrize("room", ["export", "engines", "triton_repo", "client", "trunk"])
def test_commands_in_errors_can_be_pasted(room: str) -> None:
    """Also for a folder with a space in its name."""
    found = {
        path.relative_to(ROOT): values
        for path in (ROOT / room).rglob("*.py")
        if (values := unquoted_values(path.read_text()))
    }
    assert not found
