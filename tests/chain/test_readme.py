"""The documents do what they say: README.md's blocks, pasted one after the other into one shell, and others' commands.

A comment above a block says what is special about it:
<!-- test: starts a server --> the reader then waits for the line that says that it serves;
<!-- test: gpu --> it needs a GPU; here it is parsed, and built as far as that needs none;
<!-- test: installs --> it installs ditforge, which CI does by itself (.ci/run), and tests do not do again;
<!-- test: shown FILE --> it is code of the repository.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import tomllib
from command_line import PATIENCE
from documents import CONTRIBUTING, DOCUMENTS, README, ROOT, Block, blocks, commands, parse, spans
from PIL import Image
from replicas import lasting_port

from ditforge.engines.gpus import default_precision, find_target

PASTED = [README, ROOT / "docs" / "client.md", ROOT / "docs" / "serving.md"]  # in one shell, in this order
INSTALLS, GPU, STARTS, SHOWN = "installs", "gpu", "starts a server", "shown "
# A reader's machine has these ports free, and its server is where clients look by default.
WRAPPER = """#!/bin/bash
case "$*" in
  "serve "*" --port "* | "generate "*" --url "*) ;;
  "serve "*) set -- "$@" --port {port} ;;
  "generate "*) set -- "$@" --url localhost:{port} ;;
esac
exec {python} -m ditforge "$@"
"""
START = """set -eu
trap 'kill $(jobs -p) 2> /dev/null; wait' EXIT
"""
# Until a line more than before says that a server is ready, or the server has ended.
WAIT = """
while [ "$(grep -c '^serving ' "$PRINTED")" -lt {count} ]; do kill -0 $!; sleep 0.2; done
"""


def pasted() -> list[Block]:
    """The blocks that a reader pastes, and that need no GPU."""
    found = [block for document in PASTED for block in blocks(document)]
    return [block for block in found if block.language in ("sh", "python") and block.mark not in (INSTALLS, GPU)]


def gpu_blocks() -> list[Block]:
    return [block for document in PASTED for block in blocks(document) if block.mark == GPU]


def script(ports: dict[str, int]) -> str:
    """All pasted blocks as one script, with other ports."""
    text, servers = START, 0
    for block in pasted():
        text += f"\necho '### {block}'\n"
        text += f"python - << 'END'\n{block.text}END\n" if block.language == "python" else block.text
        if block.mark == STARTS:
            servers += 1
            text += WAIT.format(count=servers)
    for written, free in ports.items():
        text = text.replace(written, str(free))
    return text.replace("0.0.0.0", "127.0.0.1")


def test_blocks_pasted_from_top_to_bottom(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout with the session's export, which the README's command finds up to date."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    shutil.copytree(tiny.onnx, tmp_path / "out" / "onnx")
    ports = {port: lasting_port() for port in ("8001", "8002", "8011")}
    wrapper, printed = tmp_path / "bin" / "ditforge", tmp_path / "printed"
    wrapper.parent.mkdir()
    wrapper.write_text(WRAPPER.format(port=ports["8001"], python=sys.executable))
    wrapper.chmod(0o755)
    python = wrapper.with_name("python")  # no link: it would not be that of the virtual environment
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=":")
    monkeypatch.setenv("PRINTED", str(printed))
    with printed.open("w") as file:
        done = subprocess.run(
            ["bash"],
            input=script(ports),
            cwd=tmp_path,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=4 * PATIENCE,
            check=False,
        )
    said = printed.read_text()
    assert done.returncode == 0, said
    assert said.count("### ") == len(pasted())
    assert "out/onnx is up to date" in said
    assert "error:" not in said
    for name in ("circle.png", "again.jpg", "wide.png"):
        with Image.open(tmp_path / name) as picture:
            picture.load()


@pytest.mark.parametrize("block", gpu_blocks(), ids=str)
def test_blocks_for_a_gpu_are_parsed(block: Block) -> None:
    for words in commands(block):
        parse(words)


def test_blocks_for_a_gpu_are_built(exports, tmp_path: Path) -> None:
    """As pasted, but for the exports, of which the session has the same, and for the server, which needs the GPU."""
    for words in (words for block in gpu_blocks() for words in commands(block)):
        values = parse(words)
        if words[1] == "export":
            assert str(values["checkpoint"]) == "models/flux-tiny"
            precision = values.get("precision") or default_precision(find_target(values["gpu"]))[0]
            shutil.copytree(exports(precision, "bf16"), tmp_path / values["out"])
        elif words[1] != "serve":
            command = [sys.executable, "-m", *words]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=False)
            assert done.returncode == 0, f"{words}: {done.stderr}"
    assert {path.name for path in (tmp_path / "out" / "repo-rtx4090").iterdir()} >= {"dit", "vae_decoder"}


def test_the_configuration_of_nginx(tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if nginx is None:
        pytest.skip("apt install nginx-light")
    (block,) = (block for document in DOCUMENTS for block in blocks(document) if block.language == "nginx")
    (tmp_path / "ditforge.conf").write_text(re.sub(r"gpu[12]:", "127.0.0.1:", block.text))
    whole = tmp_path / "nginx.conf"
    kinds = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
    temporary = "".join(f"  {kind}_temp_path {kind};\n" for kind in kinds)
    http = f"http {{\n  access_log off;\n{temporary}  include ditforge.conf;\n}}\n"
    whole.write_text(f"pid {tmp_path}/pid;\nevents {{}}\n{http}")
    done = subprocess.run(
        [nginx, "-t", "-p", tmp_path, "-c", whole, "-e", "log"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_blocks_that_install_name_what_there_is() -> None:
    """CI runs these: `make`, which installs by pip, and the image's installation."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    known = set(metadata("ditforge").get_all("Provides-Extra") or [])
    found = [block for block in blocks(README) if block.mark == INSTALLS]
    assert found
    for words in (words for block in found for words in commands(block)):
        if words[0] == "make":
            assert words[1] in targets
        elif words[:2] == ["pip", "install"]:
            assert set(words[-1].removeprefix(".[").removesuffix("]").split(",")) <= known
        else:
            assert words[:3] == ["python3", "-m", "venv"] or words[0] == ".", words


def test_the_table_of_extras_is_that_of_the_package() -> None:
    rows = README.read_text().partition("| extra |")[2].partition("\n\n")[0].splitlines()
    listed = [extra for row in rows for extra in re.findall("`(.+?)`", row.split("|")[1])]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert sorted(listed) == sorted(declared)


def test_marks_are_known() -> None:
    marks = {block.mark for document in DOCUMENTS for block in blocks(document)}
    assert {mark for mark in marks if not mark.startswith(SHOWN)} <= {"", INSTALLS, GPU, STARTS}


@pytest.mark.parametrize("block", [block for block in blocks(CONTRIBUTING) if block.mark.startswith(SHOWN)], ids=str)
def test_code_that_is_shown_is_what_is_there(block: Block) -> None:
    file = block.mark.removeprefix(SHOWN)
    assert block.text in (ROOT / file).read_text(), f"copy it again from {file}"


def test_every_kind_of_part_is_shown() -> None:
    shown = {block.mark.removeprefix(SHOWN) for block in blocks(CONTRIBUTING)}
    families, compilers = "tests/toy/toy_family.py", "tests/toy/toy_compiler.py"
    samplers, schedules = "client/samplers/euler.py", "client/schedules/simple.py"
    assert shown >= {families, compilers, samplers, schedules, "trunk/commands/gpus.py"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_can_be_parsed(document: Path) -> None:
    """Those of blocks, and those in sentences and tables."""
    in_blocks = [words for block in blocks(document) if block.language == "sh" for words in commands(block)]
    for words in [*in_blocks, *spans(document)]:
        if words[0] == "ditforge":
            parse(words)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert re.match(r"https?://", target) or (document.parent / target).exists(), target
