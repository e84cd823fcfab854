"""How an option is written on the command line and in Python: an error names both, since it may be read in both."""

from __future__ import annotations


def option(python: str, flag: str = "") -> str:
    """`python` is NAME=VALUE as a public function takes it; `flag` is the same on the command line, by default of that
    name.
    """
    name, _, value = python.partition("=")
    dashed = name.replace("_", "-")
    return f"{flag or f'--{dashed} {value}'} (in Python: {python})"
