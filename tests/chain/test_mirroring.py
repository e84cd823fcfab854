"""Where tests lie: `tests/export/graph/test_resuming.py` tests `export/graph/resuming.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAIN = Path("chain")  # what many sources do together, from a checkpoint to a picture
TOY = Path("toy")  # a package of somebody else's, with a test of what ditforge does with it


def sources(test: Path) -> list[Path]:
    """The files that a test of this path, below tests/, can be of; one called like its folder is of the package."""
    name = test.stem.removeprefix("test_")
    room = ROOT / "tests" if test.parts[0] == "support" else ROOT
    package = [room / test.parent / "__init__.py"] if name == test.parent.name else []
    return [room / test.with_name(f"{name}.py"), room / test.with_name(f"__{name}__.py"), *package]


def all_tests() -> list[Path]:
    """All files of tests, by their paths below tests/."""
    found = sorted(path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py"))
    return [path for path in found if path.parent not in (CHAIN, TOY)]


@pytest.mark.parametrize("test", all_tests(), ids=str)
def test_a_test_has_the_path_of_its_source(test: Path) -> None:
    assert any(source.is_file() for source in sources(test)), f"tests/{test} is of none of {sources(test)}"


def test_all_tests_are_looked_at() -> None:
    assert Path("export/graph/test_resuming.py") in all_tests()
    assert not any(source.is_file() for source in sources(Path("export/graph/test_nothing.py")))
