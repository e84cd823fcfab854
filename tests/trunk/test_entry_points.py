"""Entry points of ditforge's own that a checkout no longer has, since it was installed with -e."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from ditforge import entry_points
from ditforge.errors import UserError


@pytest.mark.parametrize(
    "value",
    ["ditforge.engines.compilers.gone:COMPILER", "ditforge.gone.gone:COMPILER", "ditforge.engines.compilers:NO_SUCH"],
)
def test_what_is_stale(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("gone", value, entry_points.COMPILERS)
    monkeypatch.setattr(entry_points, "installed", lambda group: {"gone": point})
    with pytest.raises(UserError, match=f"(?s)installed with {value} as 'gone'.*fix:   .*pip install -e "):
        entry_points.load(entry_points.COMPILERS, "gone", object)


@pytest.mark.parametrize("lacks", ["torch", "onnxruntime", "ditforge_toy", "ditforge.engines.gone"])
def test_what_a_module_lacks_is_another_error(lacks: str) -> None:
    """The command line says how to install a package."""
    point = EntryPoint("toy", "ditforge.engines.compilers.onnxruntime:COMPILER", entry_points.COMPILERS)
    assert not entry_points.is_stale(point, ModuleNotFoundError(name=lacks))
    assert not entry_points.is_stale(point, ImportError("cannot import name"))
    assert not entry_points.is_stale(point, AttributeError("of the module's own code"))
