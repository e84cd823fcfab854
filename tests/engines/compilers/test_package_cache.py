"""Packages that were compiled before are not compiled again, and those of anything else are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditforge.engines.compilers import package_cache, region_packages
from ditforge.engines.compilers.package_cache import Example, Package, Packages
from ditforge.engines.compilers.region_packages import tasks_of
from ditforge.regions import Stored


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ditforge" / "packages"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that were compiled, in the place of a compiler, and loaded without a loader."""
    found: list[str] = []

    def write(package: Package, name: str, more: Mapping[str, Any]) -> tuple[float, float]:
        package.path.write_bytes(b"compiled " + package.content)
        found.append(package.kind)
        return 0.0, 0.0

    monkeypatch.setattr(region_packages, "compile_package", write)
    monkeypatch.setattr(package_cache, "load_package", load)
    return found


def compile_packages(packages: list[Package]) -> None:
    """Do in this process what is a task of its own for each package."""
    for task in tasks_of("dit", packages):
        task.function(*task.arguments, add=None)


def load(path: Path, device: torch.device) -> None:
    if not path.read_bytes().startswith(b"compiled "):
        raise RuntimeError("not a package")


def package(path: Path, **other: Any) -> Package:
    example = Example((3, 4), torch.float32)
    made = Package(path, path.stem, b"program", (example,), (Stored(name="a", scale="s"),), "cpu", {"depth": 1})
    return replace(made, **other)


def test_what_was_compiled_is_not_compiled_again(tmp_path: Path, cache: Path, compiled: list[str]) -> None:
    for name in ("first", "again"):
        compile_packages([package(tmp_path / f"{name}.pt2")])
    assert compiled == ["first"]
    assert (tmp_path / "again.pt2").read_bytes() == b"compiled program"
    assert len(list(cache.iterdir())) == 1


def test_equal_packages_of_one_build_are_compiled_once(tmp_path: Path, compiled: list[str]) -> None:
    """Both were missing when the build was planned."""
    first, second, other = (tmp_path / f"{name}.pt2" for name in ("first", "second", "other"))
    packages = [package(first), package(second), package(other, content=b"another program")]
    tasks = tasks_of("t5", packages)
    assert [one.makes == tasks[0].makes for one in tasks] == [True, True, False]
    for one in tasks:
        one.function(*one.arguments, add=None)
    assert compiled == ["first", "other"]
    assert first.read_bytes() == second.read_bytes() != other.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"content": b"another program"},
        {"examples": (Example((3, 8), torch.float32),)},
        {"examples": (Example((3, 4), torch.float16),)},
        {"examples": (Example((3, 4), torch.float32, frozenset({0})),)},
        {"stored": (Stored(name="a", scheme="fp8", scale="s", activation_scale=1.0),)},
        {"settings": {"depth": 2}},
    ],
)
def test_whatever_is_different_is_compiled(tmp_path: Path, compiled: list[str], change: dict[str, Any]) -> None:
    compile_packages([package(tmp_path / "a.pt2")])
    compile_packages([package(tmp_path / "b.pt2", **change)])
    assert compiled == ["a", "b"]


def test_names_and_values_of_weights_are_no_difference(tmp_path: Path, compiled: list[str]) -> None:
    """Fine-tunes of a model share its packages, whose weights are inputs."""
    for name, scale in (("a", 1.0), ("b", 2.0)):
        stored = (Stored(name=name, scheme="fp8", scale=f"{name}_scale", activation_scale=scale),)
        compile_packages([package(tmp_path / f"{name}.pt2", stored=stored)])
    assert compiled == ["a"]


@pytest.mark.parametrize("other", ["version", "computer", "code"])
def test_packages_are_for_a_version_and_a_machine(
    tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    compile_packages([package(tmp_path / "a.pt2")])
    changes: dict[str, Callable[[], None]] = {
        "version": lambda: monkeypatch.setattr(torch, "__version__", "9.9"),
        "computer": lambda: monkeypatch.setattr(package_cache, "computer", lambda device: "another"),
        "code": lambda: monkeypatch.setattr(package_cache, "CODE", ("region_lowering.py",)),
    }
    changes[other]()
    compile_packages([package(tmp_path / "b.pt2")])
    assert compiled == ["a", "b"]


def test_a_damaged_one_is_compiled_again(tmp_path: Path, cache: Path, compiled: list[str]) -> None:
    compile_packages([package(tmp_path / "a.pt2")])
    (kept,) = cache.iterdir()
    kept.write_bytes(b"damaged")
    compile_packages([package(tmp_path / "b.pt2")])
    assert compiled == ["a", "b"]
    assert kept.read_bytes() == b"compiled program"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, cache: Path, compiled: list[str]) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file in the place of the folder")
    compile_packages([package(tmp_path / "a.pt2")])
    assert (tmp_path / "a.pt2").is_file()


def test_the_oldest_go(tmp_path: Path, cache: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_cache, "MOST", 2)
    kept = Packages()
    made = [package(tmp_path / f"{number}.pt2", content=f"{number}".encode()) for number in range(3)]
    for age, one in enumerate(made):
        compile_packages([one])
        if kept.path_of(one).exists():
            os.utime(kept.path_of(one), (1000 + age, 1000 + age))
    assert [kept.path_of(one).exists() for one in made] == [False, True, True]


def test_an_example_knows_what_varies() -> None:
    example = Example.between(torch.zeros(1, 3, 8), torch.zeros(4, 3, 16))
    assert example == Example((4, 3, 16), torch.float32, frozenset({0, 2}))
