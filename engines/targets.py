"""What can be compiled for: the value of `--gpu`."""

from __future__ import annotations

from ditforge.errors import UserError

CPU = "cpu"


def find_target(name: str) -> str:
    """The target that the user calls `name`. Raises UserError if no compiler here knows it."""
    if name.lower() == CPU:
        return CPU
    raise UserError(f"no compiler for {name!r} is part of this version", "--gpu cpu")
