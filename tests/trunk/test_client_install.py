"""`pip install ditforge[client]` from the wheel: a client, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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


def test_client_from_the_wheel(schnell_server: Server, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("ditforge", "export", "engines", "triton_repo", "client"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
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
    with Image.open(work / "command.png") as command, Image.open(work / "python.png") as api:
        assert command.size == (96, 96)
        assert largest_difference(command, api) <= LAST_BIT
