"""The C++ compiler that engines of Inductor are compiled with: whether there is one, before anything is begun."""

from __future__ import annotations

from pathlib import Path

import pytest

from ditforge import cxx_compiler
from ditforge.engines.build import BuildOptions, build
from ditforge.errors import UserError


def test_the_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    assert (cxx_compiler.name(), cxx_compiler.works()) == ("g++", True)


@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler", "/"])
def test_a_build_without_one(schnell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert not cxx_compiler.works()
    with pytest.raises(UserError, match=rf"needs a C\+\+ compiler, and {compiler} is none") as error:
        build(schnell.onnx, tmp_path / "engines", BuildOptions(gpu="cpu", compiler="inductor"))
    assert "CXX=g++" in error.value.fix
    assert not (tmp_path / "engines").exists()
