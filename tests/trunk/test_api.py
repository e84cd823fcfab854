"""`import ditforge`: the calls of the README's shell lines, and how they refuse what they do not know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ditforge
from ditforge import manifest


def test_the_stages_in_python(schnell, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On the session's export, which is up to date; and nothing is printed."""
    assert ditforge.export_checkpoint(str(schnell.checkpoint), schnell.onnx).fresh
    seen: list[str] = []
    built = ditforge.build_engines(
        str(schnell.onnx), str(tmp_path / "engines"), progress=lambda doing, *_: seen.append(doing), gpu="cpu"
    )
    assert set(built.rebuilt) == set(built.manifest.engines) and seen[-1] == "done"
    assert ditforge.write_repository(tmp_path / "engines", tmp_path / "repo") == "there was none before"
    assert ditforge.write_repository(tmp_path / "engines", tmp_path / "repo") == ""
    with ditforge.serve(str(tmp_path / "repo"), port=0) as server, ditforge.Client(server.url) as client:
        assert client.model.name == manifest.read(schnell.onnx, "onnx").model.name
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("call", "options", "problem", "fix"),
    [
        ("export_checkpoint", {"precison": "fp8"}, "no option 'precison'", "precision=…"),
        ("export_checkpoint", {"lora": "a.safetensors"}, "no option 'lora'", "loras=…"),
        ("build_engines", {"max_bach": 2}, "no option 'max_bach'", "batch=…"),
        ("build_engines", {"segments": "two"}, "segments must be an integer, got 'two'", "segments="),
        ("build_engines", {"gpu": 5}, "gpu must be a string, got 5", "gpu="),
        ("export_checkpoint", {"loras": [("a.safetensors", "much")]}, "loras must be a list of paths", "loras="),
        ("serve", {"prot": 8001}, "no option 'prot'", "port=…"),
    ],
)
def test_options_that_there_are_not(call: str, options: dict[str, Any], problem: str, fix: str, tmp_path: Path) -> None:
    places = [tmp_path] if call == "serve" else [tmp_path, tmp_path / "out"]
    with pytest.raises(ditforge.UserError) as error:
        getattr(ditforge, call)(*places, **options)
    assert problem in error.value.problem
    assert fix in error.value.fix
    assert not (tmp_path / "out").exists()


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, ditforge as d; dir(d); print([m for m in ('torch', 'grpc', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_is_public() -> None:
    assert {"export_checkpoint", "build_engines", "write_repository", "serve", "Client"} <= set(dir(ditforge))
    for name in dir(ditforge):
        assert getattr(ditforge, name)
    with pytest.raises(AttributeError, match="exprot"):
        ditforge.exprot  # noqa: B018
