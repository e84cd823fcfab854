"""What bash, with the script that `ditforge --show-completion` prints, offers for the beginning of a line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ditforge

from ditforge import completion
from ditforge.export.quantisation.precision import PRECISIONS


def offered(line: str, folder: Path) -> list[str]:
    """What completes the last word of the line, as bash asks for it."""
    (folder / "ditforge").write_text(f"#!{sys.executable}\nfrom ditforge.__main__ import main\nmain()\n")
    (folder / "ditforge").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    environment["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    script = subprocess.run(
        ["ditforge", "--show-completion", "bash"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    words = line.split(" ")
    program = f"""{script}
COMP_WORDS=({" ".join(words)})
COMP_CWORD={len(words) - 1}
_ditforge_completion ditforge
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("ditforge ex", {"export"}),
        ("ditforge build onnx --gpu rtx409", {"rtx4090"}),
        ("ditforge export model --gpu sm_12", {"sm_120", "sm_121"}),
        ("ditforge export model --precision fp8", {"fp8", "fp8-weights"}),
        ("ditforge up model --compiler tensorrt-", {"tensorrt-rtx"}),
        ("ditforge generate a --schedule kar", {"karras"}),
        ("ditforge generate a --sampler eul", {"euler", "euler_ancestral"}),
    ],
)
def test_bash(line: str, names: set[str], tmp_path: Path) -> None:
    assert set(offered(line, tmp_path)) == names


def test_the_precisions_are_those_of_the_export() -> None:
    assert completion.precisions() == list(PRECISIONS)


def test_help_names_it(tmp_path: Path) -> None:
    assert "--install-completion" in ditforge("--help", cwd=tmp_path).out


@pytest.mark.parametrize(("kind", "names"), [("sampler", completion.samplers()), ("schedule", completion.schedules())])
def test_help_lists_every_name(kind: str, names: list[str], tmp_path: Path) -> None:
    """Those of new files too, which nothing else has to name."""
    words = " ".join(ditforge("generate", "--help", cwd=tmp_path).out.split())
    assert f"{', '.join(names)}. docs/client.md" in words.partition(f"--{kind} ")[2]
