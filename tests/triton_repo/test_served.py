"""What is wrong with a repository is said before Triton starts, with the file's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from python_models import ADD_ONE, write_models

from ditforge.errors import UserError
from ditforge.triton_repo.limits import BadRequest
from ditforge.triton_repo.served import message_limit, read_models
from ditforge.triton_repo.server import start


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return write_models(tmp_path / "repo", add=ADD_ONE)


def test_a_model_that_somebody_else_made(repository: Path) -> None:
    models, engines = read_models(repository)
    assert (list(models), engines) == (["add"], "")
    assert message_limit(models) > 64 << 20
    models["add"].check_outputs(["y"])
    models["add"].check_outputs([])
    for names in (["x"], ["y", "y"], ["y", "x"]):
        with pytest.raises(BadRequest, match="the outputs are y"):
            models["add"].check_outputs(names)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"name: {", "is no configuration of a model"),
        (b"\xff\xfe", "is no configuration of a model"),
        (b'parameters { key: "ditforge_limits" value { string_value: "{}" } }', "the parameter ditforge_limits in"),
        (b'parameters { key: "ditforge_limits" value { string_value: "[" } }', "the parameter ditforge_limits in"),
    ],
)
def test_a_broken_configuration(repository: Path, text: bytes, words: str) -> None:
    file = repository / "add" / "config.pbtxt"
    file.write_bytes(text)
    with pytest.raises(UserError, match=words) as caught:
        start(repository, port=0)
    assert str(file) in caught.value.problem
    assert caught.value.fix == f"ditforge repo ENGINE_DIR --out {repository}"


def test_a_model_without_its_code(repository: Path) -> None:
    code = repository / "add" / "1" / "model.py"
    code.unlink()
    with pytest.raises(UserError, match="the model add has no code") as caught:
        start(repository, port=0)
    assert str(code) in caught.value.problem


def test_a_repository_of_another_version(tiny, tmp_path: Path) -> None:
    """Its code names modules that are elsewhere now; Triton's log would say so, in Python's words."""
    repository = shutil.copytree(tiny.repository, tmp_path / "repo")
    code = repository / "t5" / "1" / "model.py"
    code.write_text("from ditforge.triton_repo.engine_model import TritonPythonModel  # noqa: F401\n")
    with pytest.raises(UserError, match="repo was written by another version of ditforge") as caught:
        start(repository, port=0)
    assert caught.value.fix == f"ditforge repo ENGINE_DIR --out {repository}"


def test_a_repository_that_has_lost_a_model(tiny, tmp_path: Path) -> None:
    repository = shutil.copytree(tiny.repository, tmp_path / "repo")
    shutil.rmtree(repository / "dit")
    with pytest.raises(UserError, match="has lost the model dit: there is no ") as caught:
        start(repository, port=0)
    assert caught.value.fix == f"ditforge repo ENGINE_DIR --out {repository}"
