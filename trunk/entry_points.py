"""Finds the objects that installed packages offer to ditforge under the entry points of its groups.

ditforge's own families, layouts and compilers are found in the same way. Another package declares its own in its
pyproject.toml, for example:

    [project.entry-points."ditforge.compilers"]
    mine = "my_package.my_compiler:COMPILER"

Source: https://packaging.python.org/en/latest/specifications/entry-points/
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from ditforge import install_hint
from ditforge.errors import DitforgeError, UserError

FAMILIES, LAYOUTS, COMPILERS = "ditforge.families", "ditforge.layouts", "ditforge.compilers"

T = TypeVar("T")


@cache
def installed(group: str) -> dict[str, EntryPoint]:
    """The entry points of the group by name. Raises UserError if two packages use the same name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            problem = f"two packages bring {point.name!r} under {group}: {other.value} and {point.value}"
            raise UserError(problem, "uninstall one of them")
    if not found:
        raise DitforgeError(f"no package brings anything under {group}: ditforge is not installed", "pip install '.'")
    return found


def load(group: str, name: str, cls: type[T]) -> T:
    """Load the object called `name`, which must be of the class `cls`.

    Raises UserError if its module cannot be imported or lacks the object, or if the object is of another class.
    """
    found = _load(group, name)
    if not isinstance(found, cls):
        kind = cls.__name__.lower()
        raise UserError(f"what is installed as the {kind} {name!r} is a {type(found).__name__}", "uninstall it")
    return found


def load_all(group: str, cls: type[T]) -> list[T]:
    """Load all objects of the group, which must be of the class `cls`. Raises UserError as load() does."""
    return [load(group, name, cls) for name in installed(group)]


def _load(group: str, name: str) -> object:
    point = installed(group)[name]
    try:
        return point.load()
    except (ImportError, AttributeError) as error:
        if point.value.startswith("ditforge."):
            if not is_stale(point, error):
                raise
            problem = f"ditforge was installed with {point.value} as {name!r} under {group}, and its source lacks that"
            raise UserError(problem, install_hint.again()) from error
        brought = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        problem = f"{name!r}{brought} cannot be loaded from {point.value}: {error}"
        raise UserError(problem, "install what it needs, or uninstall the package that brings it") from error


def is_stale(point: EntryPoint, error: Exception) -> bool:
    """Whether a checkout that is installed with -e has changed since then: it lacks the module, or the object in it."""
    if isinstance(error, ModuleNotFoundError):
        return error.name is not None and f"{point.module}.".startswith(f"{error.name}.")
    return isinstance(error, AttributeError) and not hasattr(import_module(point.module), point.attr)
