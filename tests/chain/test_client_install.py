"""`pip install ditforge[client]` from the wheel: a client, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from pictures import LAST_BIT, largest_difference
from PIL import Image

from ditforge.triton_repo.server import Server

ROOT = Path(__file__).parents[2]
ABSENT = ["torch", "onnx", "onnxruntime", "diffusers", "transformers", "client", "export", "engines", "triton_repo"]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_source(file: Path) -> bool:
    return file.is_file() and "__pycache__" not in file.parts


def in_wheel(room: Path, file: Path) -> str:
    folder = "ditforge" if room.name == "trunk" else f"ditforge/{room.name}"
    return f"{folder}/{file.relative_to(room).as_posix()}"


def test_client_from_the_wheel(schnell_server: Server, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    rooms = [init.parent for init in ROOT.glob("*/__init__.py")]
    for room in rooms:
        shutil.copytree(room, source / room.name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("ditforge/")}
    assert packed == {in_wheel(room, file) for room in rooms for file in room.rglob("*") if is_source(file)}
    run(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{wheel}[client]", cwd=tmp_path)

    work = tmp_path / "work"
    work.mkdir()
    find = f"import importlib.util as u, json; print(json.dumps([m for m in {ABSENT} if u.find_spec(m)]))"
    assert json.loads(run(python, "-c", find, cwd=work)) == []

    options = ("--url", schnell_server.url, "--seed", "0", "--out", "command.png")
    assert run(python.with_name("ditforge"), "generate", "a red circle", *options, cwd=work) == "command.png\n"
    program = "from ditforge.client import Client\n"
    program += f'Client("{schnell_server.url}").generate("a red circle", seed=0).save("python.png")'
    run(python, "-c", program, cwd=work)
    run(python, "-c", "import ditforge.client", cwd=ROOT)  # where folders are called like packages
    with Image.open(work / "command.png") as command, Image.open(work / "python.png") as api:
        assert command.size == (96, 96)
        assert largest_difference(command, api) <= LAST_BIT
